"""Mergers, slots and adaptive methods: each against a slow reference of its rule, and on planted inputs.

References take one image, with plain loops. Properties are in ``test_reducers.py``; ``test_model.py`` has whole models.
"""

import math
from dataclasses import replace

import pytest
import torch
from cases import DIM, HEADS, KEEP, PATCHES, case, each_rule, make, part, read, run
from torch.nn import functional as F

from cropr.pruning.methods import REDUCERS
from cropr.pruning.reducers import Context, create
from cropr.pruning.tokens import Tokens


def slow_evit(reducer, tokens, context, keep):
    x, score = tokens.patches[0], context.cls_attention[0].mean(dim=0).tolist()
    order = sorted(range(len(x)), key=lambda j: -score[j])
    rest = order[keep - 1 :]
    total = sum(score[j] for j in rest) if reducer.corrected else 1.0
    fused = sum(score[j] / total * x[j] for j in rest)
    return [x[j] for j in sorted(order[: keep - 1])] + [fused]


def slow_merge(reducer, tokens, context, keep):
    """ToMe, PiToMe and ToFu: rows of (key, value, size), merged until ``keep`` are left."""
    name, prefix = type(reducer).__name__, tokens.prefix
    sizes = [1.0] * tokens.num_patches if tokens.size is None else tokens.size[0].tolist()
    rows = list(zip(context.mean_key[0, prefix:], tokens.patches[0], sizes, strict=True))
    while len(rows) > keep:
        gone, count = len(rows) - keep, len(rows)
        like = [[float(F.cosine_similarity(a[0], b[0], dim=0)) for b in rows] for a in rows]
        sources = [j for j in range(count) if (prefix + j) % 2 == 0]
        targets, others = [j for j in range(count) if (prefix + j) % 2], []
        if name == "PiToMe":
            margin = 0.9 * (1 - reducer.depth)
            energy = [sum(s if s >= margin else math.exp(s - margin) - 1 for s in line) for line in like]
            order = sorted(range(count), key=lambda j: -energy[j])
            sources, targets, others = order[: 2 * gone : 2], order[1 : 2 * gone : 2], sorted(order[2 * gone :])
        into = {i: max(targets, key=lambda j: like[i][j]) for i in sources}
        merged = sorted(sources, key=lambda i: -like[i][into[i]])[:gone]
        new = [rows[j] for j in others + [i for i in sources if i not in merged]]
        for j in targets:
            members = [rows[j]] + [rows[i] for i in merged if into[i] == j]
            size = sum(s for _, _, s in members)
            value = sum(s * x for _, x, s in members) / size
            if name == "ToFu" and len(members) > 1:
                longest = max(x.norm() for _, x, _ in members)
                value = value / value.norm() * longest if reducer.depth > 0.5 else rows[j][1]
            new.append((rows[j][0], value, size))
        rows = new
    return [x for _, x, _ in rows]


def slow_medoids(reducer, tokens, context, keep):
    x = tokens.patches[0]
    weight = {"column_sums": context.column_sums[0], "cls_attention": context.cls_attention[0].mean(dim=0)}
    w = weight[next(iter(reducer.reads))].tolist() if reducer.reads else [1.0] * len(x)
    d = [[float((a - b).norm()) for b in x] for a in x]
    medoids = sorted(range(len(x)), key=lambda j: -w[j])[:keep]
    if not reducer.reads:
        medoids = [int((k + 0.5) * len(x) / keep) for k in range(keep)]
    for _ in range(reducer.iterations):
        nearest = [min(range(keep), key=lambda k: d[j][medoids[k]]) for j in range(len(x))]
        for k in range(keep):
            members = [j for j in range(len(x)) if nearest[j] == k]
            if reducer.corrected:
                medoids[k] = min(members, key=lambda i: sum(w[j] * d[i][j] for j in members))
            else:
                medoids[k] = min(members, key=lambda i: w[i] * sum(d[i]))
    return [x[m] for m in medoids]


def slow_peaks(reducer, tokens, context, keep):
    x, n = tokens.patches[0], tokens.num_patches
    d = [[float((a - b).norm()) / len(a) ** 0.5 for b in x] for a in x]
    mean = [sum(v * v for v in sorted(line)[: reducer.neighbours]) / reducer.neighbours for line in d]
    density = [math.exp(-mean[i]) + (0 if reducer.corrected else 1e-6 * (i * 0.618034 % 1)) for i in range(n)]
    apart = [min((d[i][j] for j in range(n) if density[j] > density[i]), default=max(map(max, d))) for i in range(n)]
    centres = sorted(range(n), key=lambda i: -density[i] * apart[i])[:keep]
    nearest = [centres.index(j) if j in centres else min(range(keep), key=lambda k: d[j][centres[k]]) for j in range(n)]
    weight = [1.0 if reducer.weight is None else math.exp(float(reducer.weight(row))) for row in x]
    groups = [[j for j in range(n) if nearest[j] == k] for k in range(keep)]
    return [sum(weight[j] * x[j] for j in group) / sum(weight[j] for j in group) for group in groups]


def slow_sit(reducer, tokens, context, keep):
    _, first, _, second = reducer.logits
    logits = [second(F.gelu(first(reducer.logits[0](row)))) * reducer.scale.flatten() for row in tokens.patches[0]]
    out = []
    for k in range(keep):
        weight = [math.exp(float(row[k])) for row in logits]
        out.append(sum(w * x for w, x in zip(weight, tokens.patches[0], strict=True)) / sum(weight))
    return out


def slow_sinkhorn(reducer, tokens, context, keep):
    """With the marginals of 1 / (K + N) as written, in probabilities."""
    x = [row / row.norm() for row in tokens.patches[0].double()]
    n, target = len(x), 1 / (keep + len(x))
    kernel = [[float((p / p.norm()) @ row) for row in x] for p in reducer.prototypes.double()]
    kernel = [[math.exp(value / reducer.epsilon) for value in line] for line in kernel]
    columns = [1.0] * n
    for _ in range(reducer.iterations):
        rows = [target / sum(kernel[k][j] * columns[j] for j in range(n)) for k in range(keep)]
        columns = [target / sum(kernel[k][j] * rows[k] for k in range(keep)) for j in range(n)]
    plan = [[kernel[k][j] * rows[k] * columns[j] / target for j in range(n)] for k in range(keep)]
    return [sum(plan[k][j] * x[j] for j in range(n)).float() for k in range(keep)]


def slow_merger(reducer, tokens, context, keep):
    x = [reducer.norm(row) for row in tokens.patches[0]]
    scale = DIM**-0.5 if reducer.scale != 1 else 1.0
    out = []
    for query in reducer.queries:
        weight = [math.exp(float(query @ row) * scale) for row in x]
        out.append(sum(w * row for w, row in zip(weight, x, strict=True)) / sum(weight))
    return out


def slow_ats(reducer, tokens, context, keep):
    scores = [sum(a * v for a, v in zip(*one, strict=True)) for one in zip(
        context.cls_attention[0].T.tolist(), context.value_norms[0].T.tolist(), strict=True)]  # fmt: skip
    reached = [sum(scores[: j + 1]) / (sum(scores) + 1e-6) for j in range(len(scores))]
    picks = []
    for i in range(1, keep + 1):
        point = (2 * i - 1) / (2 * (keep + 1))
        if reducer.corrected:
            picks.append(next(j for j, value in enumerate(reached) if value >= point))
        else:
            picks.append(min(range(len(reached)), key=lambda j: abs(reached[j] - point)))
    return [tokens.patches[0, j] for j in sorted(set(picks))]


def slow_dynamic(reducer, tokens, context, keep):
    hidden = [reducer.embed(row) for row in tokens.patches[0]]
    mean = sum(h[DIM // 2 :] for h in hidden) / len(hidden)
    logits = [reducer.decide(torch.cat((h[: DIM // 2], mean))) for h in hidden]
    stay = [float(pair.softmax(dim=0)[0]) for pair in logits]
    return [tokens.patches[0, j] for j in sorted(sorted(range(len(stay)), key=lambda j: -stay[j])[:keep])]


SLOW = {
    **{"evit": slow_evit, "tome": slow_merge, "pitome": slow_merge, "tofu": slow_merge, "k_medoids": slow_medoids},
    **{"dpc_knn": slow_peaks, "sit": slow_sit, "sinkhorn": slow_sinkhorn, "patch_merger": slow_merger},
    **{"ats": slow_ats, "dynamic_vit": slow_dynamic},
}


def test_every_method_beyond_the_pruners_has_a_reference():
    assert set(SLOW) == {name for name, method in REDUCERS.items() if method.family != "pruner"}


@pytest.mark.parametrize(("prefix", "keep"), [(1, 17), (2, KEEP), (1, 4)])
@each_rule
@torch.no_grad()
def test_a_method_equals_its_slow_reference(name, options, prefix, keep):
    """Images of different scale, one at a time in the reference: a maximum over the batch would show."""
    tokens, context = case(prefix=prefix)
    tokens = tokens.replace(tokens.x * torch.tensor([0.2, 1.0, 3.0])[:, None, None])
    if "size" in REDUCERS[name].load().sets:
        tokens = replace(tokens, size=torch.randint(1, 5, (3, PATCHES)).float())
    reducer = make(name, keep, **options)
    found = reducer(tokens, keep, read(reducer, context), want_pruned=False).kept
    assert torch.equal(found.x[:, :prefix], tokens.x[:, :prefix])
    for b in range(3):
        expected = torch.stack(SLOW[name](reducer, *part(tokens, context, b), keep))
        ours = found.patches[b] if found.valid is None else found.patches[b][found.valid[b]]
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def _blobs(points: int = 10, groups: int = 3) -> tuple[Tokens, Context]:
    """Three groups of ten points around 10 e_i, spread 0.1: patch j belongs to group j // 10."""
    tokens, context = case(patches=points * groups)
    group = torch.arange(points * groups) // points
    x = 10 * F.one_hot(group, DIM) + 0.1 * torch.randn(3, points * groups, DIM)
    return tokens.replace(torch.cat((tokens.x[:, :1], x), dim=1)), context


@pytest.mark.parametrize("rule", ["reference", "corrected"])
@pytest.mark.parametrize("name", ["dpc_knn", "k_medoids"])
def test_blobs_become_pure_clusters(name, rule):
    """The update of the reference drags medoids out of their blob, so its medoids start one in each."""
    tokens, context = _blobs()
    if name == "k_medoids":
        context.column_sums[:, 4::10] += 100
    groups = run(name, tokens, context, 3, rule=rule).source.view(-1, 3, 10)
    assert (groups == groups[:, :, :1]).all()
    assert (groups[:, :, 0].sort(dim=1).values == torch.arange(3)).all()


def test_medoids_of_the_textbook_are_central_and_those_of_the_reference_light():
    """Blobs on a line, the first medoid of each planted at its middle; two light points at the rim of each."""
    x = torch.tensor([[c + offset] for c in (0.0, 10.0, 30.0) for offset in (-1.0, -0.1, 0.0, 0.1, 1.0)])
    weight = torch.tensor([0.1, 1.0, 9.0, 1.0, 0.1]).repeat(3)[None]
    tokens = Tokens.full(x[None], 0)
    found = {}
    for rule in ("corrected", "reference"):
        found[rule] = make("k_medoids", 3, 1, rule=rule).clusters(tokens.x, weight, 3)[0][0].sort().values.tolist()
    assert found["corrected"] == [2, 7, 12]
    assert set(found["reference"]) <= {0, 4, 5, 9, 10, 14}


def test_density_peaks_of_large_tokens_do_not_underflow_in_the_corrected_rule():
    """At a spread of 30 every density of the reference is 0: the order of the patches decides."""
    tokens, overlap = Tokens.full(30 * torch.randn(2, 60, 256), 0), {}
    order = torch.stack([torch.randperm(60) for _ in range(2)])
    for rule in ("reference", "corrected"):
        reducer = make("dpc_knn", dim=256, rule=rule)
        plain, moved = (reducer.clusters(one.x, 30)[0] for one in (tokens, tokens.keep(order)))
        pairs = zip(plain.tolist(), order.gather(1, moved).tolist(), strict=True)
        overlap[rule] = sum(len(set(a) & set(b)) for a, b in pairs) / 60
    assert overlap["corrected"] == 1
    assert overlap["reference"] < 0.8
    # A cluster whose weights are all tiny beside those of another one still is an average.
    reducer = make("dpc_knn", 3, rule="corrected")
    reducer.weight.weight.data.zero_()[0, 0] = 20  # exp(200) in the first blob, 1 in the others
    merged = reducer(_blobs()[0], 3, Context(), want_pruned=False).kept.patches
    assert (merged.amax(dim=2) > 9).all()
    assert merged.isfinite().all()


def test_sampling_keeps_a_patch_of_all_score_spreads_evenly_and_never_repeats_padding():
    tokens, context = case()
    one = F.one_hot(torch.tensor([6] * 3), PATCHES).float()[:, None].expand(-1, HEADS, -1)
    even = replace(context, cls_attention=torch.full((3, HEADS, PATCHES), 0.05), value_norms=torch.ones_like(one))
    assert set(run("ats", tokens, even, 9, rule="corrected").index[0].diff().tolist()) == {2}
    for rule, expected in (("corrected", {6}), ("reference", {0, 6})):  # the nearest rule also takes a neighbour
        kept = run("ats", tokens, replace(context, cls_attention=one), 5, rule=rule)
        assert kept.valid.sum(dim=1).tolist() == [len(expected)] * 3
        assert set(kept.index[0].tolist()) == expected
        first = run("ats", tokens, context, 15, rule=rule)
        assert (first.valid.sum(dim=1) < 15).any()
        shorter = replace(context, cls_attention=context.cls_attention[:, :, :15], value_norms=torch.ones(3, HEADS, 15))
        second = run("ats", first, shorter, 14, rule=rule)
        for b in range(3):
            kept = second.index[b][second.valid[b]].tolist()
            assert len(kept) == len(set(kept))
            assert set(kept) <= set(first.index[b][first.valid[b]].tolist())


@torch.no_grad()
def test_the_transport_plan_has_columns_of_one_and_rows_of_n_over_k():
    x = F.normalize(torch.randn(2, 196, 64), dim=2)
    for epsilon in (1.0, 0.25):
        plan = make("sinkhorn", 146, 64, epsilon=epsilon).plan(x)
        assert (plan.sum(dim=1) - 1).abs().max() < 1e-5
        assert float(plan.sum(dim=2).mean()) == pytest.approx(196 / 146, abs=1e-4)
    hard = make("sinkhorn", 2, 64, epsilon=1e-3, iterations=50).plan(x).amax(dim=1)
    assert (hard > 0.95).float().mean() > 0.9


@torch.no_grad()
def test_patch_merger_is_almost_one_hot_without_a_scale_and_even_with_one():
    x = F.layer_norm(torch.randn(1, 196, 1024), (1024,))
    largest = {}
    for rule in ("reference", "corrected"):
        reducer = create("patch_merger", 1024, 4, keep=20, rule=rule)
        weight = (reducer.queries @ x.transpose(1, 2) * reducer.scale).softmax(dim=2)
        largest[rule] = float(weight.amax(dim=2).mean())
    assert largest["reference"] > 0.85
    assert largest["corrected"] < 0.1


@pytest.mark.parametrize("name", ["tome", "pitome", "tofu"])
def test_means_of_merged_tokens_do_not_overflow_in_half_precision(name):
    tokens, context = case(prefix=0)
    tokens = replace(tokens, x=torch.full_like(tokens.x, 2000).half(), size=torch.full((3, PATCHES), 49.0))
    merged = run(name, tokens, context)
    assert merged.x.dtype == torch.float16
    assert (merged.x == 2000).all()


def test_a_corrected_fused_token_of_patches_without_attention_is_finite():
    tokens, context = case()
    unseen = torch.zeros_like(context.cls_attention)
    unseen[..., : KEEP - 1] = 1 / (KEEP - 1)
    assert run("evit", tokens, replace(context, cls_attention=unseen), rule="corrected").x.isfinite().all()


def test_training_and_deployment_keep_the_same_tokens_under_autocast():
    tokens, context = case(8, patches=256, dim=64)
    reducer = make("cropr", 128, 64, qkv_proj=True)
    both = (reducer, reducer.deploy())
    with torch.autocast("cpu", torch.bfloat16):
        trained, deployed = (one(tokens, 128, context, want_pruned=False).kept for one in both)
    assert torch.equal(trained.index, deployed.index)
