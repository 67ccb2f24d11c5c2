"""The HTML of the report page (jinja2): no script, no font and no style from elsewhere, readable in light and dark."""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Token Cropr, reproduced: scale {{ scale }}</title>
<style>
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1f2328; --muted: #5c6570; --line: #d8dee4; --soft: #f5f6f8; --link: #0b5cad;
  --holds: #00694d; --contradicted: #b3420a; --undecided: #5c6570;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181d; --ink: #e3e7ec; --muted: #9aa5b1; --line: #323a44; --soft: #1d232a; --link: #74b3f2;
    --holds: #4cc79f; --contradicted: #f29b62; --undecided: #9aa5b1;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.35rem; margin: 2.8rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2rem 0 .2rem; }
p { margin: .5rem 0; max-width: 52rem; }
a { color: var(--link); }
.lead { font-size: 1.1rem; }
.muted, .small { color: var(--muted); }
.small { font-size: .85rem; }
nav { margin: 1rem 0 0; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--soft);
  padding: .1em .3em; border-radius: 4px; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem;
  overflow-x: auto; }
pre code { padding: 0; background: none; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; margin: .8rem 0; }
th, td { text-align: left; vertical-align: top; padding: .45rem .7rem .45rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 600; }
td.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
.verdict { font-weight: 700; white-space: nowrap; }
.holds { color: var(--holds); } .contradicted { color: var(--contradicted); } .undecided { color: var(--undecided); }
figure { margin: 1rem 0; }
figure img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; padding: .6rem; }
figcaption { font-size: .85rem; color: var(--muted); margin-top: .3rem; }
details summary { cursor: pointer; margin: .6rem 0; }
</style>
</head>
<body>
<main>
<h1>Token Cropr, reproduced</h1>
<p class="lead">Token Cropr makes Vision Transformers faster by dropping patches that a small trained module finds
useless for the task, block by block. This page is the entry to a reproduction of its results, made at the scale
<code>{{ scale }}</code> with {{ seeds }} seed{{ "" if seeds == 1 else "s" }}.</p>
<p>Measured numbers come from the records listed below. Published numbers are the paper's (&ldquo;Token Cropr: Faster
ViTs for Quite a Few Tasks&rdquo;, CVPR 2025, <a href="https://arxiv.org/abs/2412.00965">arXiv 2412.00965</a>) and
always marked as such.</p>
<p>{{ scope }}</p>
<nav aria-label="Sections">
<a href="#claims">Claims</a>
{% for section in sections %}
<a href="#{{ section.name }}">{{ section.title }}</a>
{% endfor %}
<a href="#setting">Scale and machine</a> <a href="#runs">Runs</a> <a href="#rerun">Rerun</a>
</nav>

<h2 id="claims">Claims</h2>
<p>{{ verdicts }}</p>
{% if claims %}
<div class="wide">
<table>
<thead><tr><th>Claim</th><th>Verdict</th><th>Measured, 95&nbsp;% interval</th><th>Claimed</th></tr></thead>
<tbody>
{% for claim in claims %}
<tr><td>{{ claim.text }}<br><span class="small">{{ claim.source }}</span></td>
<td><span class="verdict {{ claim.outcome }}">{{ claim.verdict }}</span><br>
<span class="small">{{ claim.reason }}</span></td>
<td class="number">{{ claim.measured }}</td><td class="number">{{ claim.needed }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}

<h2>Notebooks</h2>
{% for section in sections %}
<h3 id="{{ section.name }}">{{ section.title }}</h3>
<p class="muted">{{ section.question }}</p>
{% for sentence in section.sentences %}
<p>{{ sentence }}</p>
{% endfor %}
{% if section.link %}
<p><a href="{{ section.link }}">Open the notebook: {{ section.title }}</a></p>
{% else %}
<p class="small">Its page has not been made at this scale.</p>
{% endif %}
{% for picture in section.pictures %}
<figure><a href="{{ picture.link }}"><img src="{{ picture.source }}" alt="{{ section.title }}: {{ picture.name }}"></a>
<figcaption>{% if picture.cut %}The upper part. {% endif %}<a href="{{ picture.link }}">Full size</a></figcaption>
</figure>
{% endfor %}
{% endfor %}

<h2 id="setting">Scale and machine</h2>
<p>Of the first notebook; each notebook states its own.</p>
<div class="wide">
<table>
<tbody>
{% for name, values in settings %}
<tr><th scope="row">{{ name }}</th><td>
{% for value in values %}
{{ value }}{% if not loop.last %}<br>{% endif %}

{% endfor %}
</td></tr>
{% endfor %}
</tbody>
</table>
</div>

<h2 id="runs">Runs</h2>
<p>{{ runs | length }} records. A <code>+</code> behind the commit: the checkout had local changes.</p>
<details>
<summary>Show all</summary>
<div class="wide">
<table>
<thead><tr><th>Used by</th><th>Seed</th><th>Result</th><th>Time</th><th>Peak memory</th><th>Commit</th><th>Record</th>
</tr></thead>
<tbody>
{% for run in runs %}
<tr><td title="{{ run.all_rows }}">{{ run.rows }} <span class="small">({{ run.kind }})</span></td>
<td>{{ run.seed }}</td>
<td class="number">{{ run.result }}</td><td class="number">{{ run.time }}</td><td class="number">{{ run.memory }}</td>
<td><code>{{ run.commit }}</code></td><td class="small">{{ run.path }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
</details>

<h2 id="rerun">Rerun</h2>
<p>Everything at this scale; what is up to date is not computed again:</p>
<pre><code>{{ everything }}</code></pre>
<p>One notebook and what it needs:</p>
{% for title, command in commands %}
<p class="small">{{ title }}</p>
<pre><code>{{ command }}</code></pre>
{% endfor %}
</main>
</body>
</html>
"""
