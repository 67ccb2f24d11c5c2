"""Claims and sentences of the report, checked on small records."""

import json
from pathlib import Path

import pytest
from synthetic import claim, with_paper_schedule
from workflow.paper.load import load

from workflow.paper import claims, setting, tables, text

ROOT = Path(__file__).parents[2]


# Claims -------------------------------------------------------------------------------------------------------------


def test_claims_are_decided_by_the_paired_interval(small):
    artefact = load(small())
    # Pairs 9.0 and 8.5: mean 8.75, half width 12.706 * 0.25 = 3.18.
    judgement = claims.judge(claim(), artefact)
    assert judgement.verdict.outcome == "holds"
    assert judgement.measured == "+8.8 [+5.6, +11.9] points"
    assert claims.judge(claim(relation="< 2"), artefact).verdict.outcome == "contradicted"
    assert claims.judge(claim(relation="> 8"), artefact).verdict.outcome == "undecided"


def test_one_seed_leaves_a_claim_undecided(small):
    verdict = claims.judge(claim(), load(small(seeds=1))).verdict
    assert (verdict.outcome, verdict.reason) == ("undecided", "one seed: no interval")


def test_claims_about_one_row_and_about_speed(small):
    artefact = load(small())
    alone = claims.judge(claim(right=None, quantity="share_of_bound", relation=">= 90"), artefact)
    assert alone.verdict.outcome == "holds"
    assert alone.measured == "94.4 [93.3, 95.0] %"
    # Separate measurements: low minus high, high minus low, in percent of the bound 1.8.
    apart = claims.judge(claim(quantity="share_of_bound", relation=">= -5"), artefact).interval
    assert (apart.low, apart.high) == pytest.approx((100 * (1.68 - 1.76) / 1.8, 100 * (1.71 - 1.73) / 1.8))


def test_a_few_rounds_decide_nothing(small):
    artefact = load(small())
    artefact.benches["cropr"]["series"]["seconds"] = [1.0] * 5
    verdict = claims.judge(claim(right=None, quantity="share_of_bound", relation=">= 90"), artefact).verdict
    assert (verdict.outcome, verdict.reason) == ("undecided", "5 rounds, a 95 % interval takes 6")


def test_claims_about_rows_that_do_not_run(small):
    artefact = load(small())
    missing = claims.judge(claim(right="tome"), artefact)
    assert (missing.verdict.outcome, missing.interval) == ("undecided", None)
    assert missing.verdict.reason == "ToMe <new> is not available: merging is missing"
    assert claims.judge(claim(quantity="top5"), artefact).verdict.reason == "not measured at this scale"
    with pytest.raises(ValueError, match="has no row 'nobody'; it has none, cropr"):
        claims.judge(claim(left="nobody"), artefact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("relation: 'about 3'", "claim a: relation: .*write one of"),
        ("relation: '>'\n  colour: red", "claim a: colour: Extra inputs"),
        ("relation: '>'\n  quantity: beauty", "claim a: quantity: .*unknown quantity 'beauty'"),
    ],
)
def test_claims_file_is_checked(tmp_path, change, message):
    path = tmp_path / "claims.yaml"
    path.write_text(f"- id: a\n  text: t\n  left: x\n  source: s\n  {change}\n")
    with pytest.raises(ValueError, match=message):
        claims.load_claims(path)


def test_claims_twice(tmp_path):
    path = tmp_path / "claims.yaml"
    path.write_text("- {id: a, text: t, left: x, relation: '>', source: s}\n" * 2)
    with pytest.raises(ValueError, match="claim 'a' is given twice"):
        claims.load_claims(path)


def test_the_projects_claims_fit_the_grid(ci):
    stated = claims.load_claims(ROOT / "config" / "claims.yaml")
    judgements = claims.judge_all(stated, ci[3])
    assert len(judgements) == len(stated) > 3
    html = tables.claims_table(judgements).html()
    assert all(word in html for word in ("✓ holds", "&gt;"))


# Sentences ----------------------------------------------------------------------------------------------------------


def test_sentences_say_what_the_records_say(small):
    artefact = load(small())
    made_with = setting.setting(artefact)
    for part in ("`tiny`", "0, 1", "32 px, 1,000 for training, 400 for validation", "`vit_tiny` with depth=4",
                 "1,000 images from random weights, batches of 8, fp32", "`vit_x.tag` at 224 px", "2 threads",
                 "commit 0123456789; Python 3.11.9, torch 2.14.1"):  # fmt: skip
        assert part in made_with
    assert "3 of 4 rows" in text.coverage(artefact)
    assert "ToMe <new> (merging is missing)" in text.coverage(artefact)
    paper = text.paper_says(artefact)
    assert "Top-1 85.8 % (None), the others from 85 % (ToMe <new>) to 85.3 % (Cropr); Speed-up 1.7x (Cropr)" in paper
    assert "confidence R: from third-party notes" in paper
    assert "860" not in paper
    speed = text.speed(artefact)
    assert "Cropr 1.70 [1.68, 1.71]x, 94 % of its bound of 1.80x" in speed
    assert "The speed-up of Cropr is 0.971 times that of Random." in speed
    assert "weights take +0.10 % of memory beside the unpruned" in speed


def test_accuracy_sentence_sorts_rows_by_their_intervals(small):
    sentence = text.accuracy(load(small()))
    assert sentence.startswith("**None** reaches 91.0 [")
    assert "between -9.5 [" in sentence
    assert sentence.endswith("above it: none; below: Random; undecided: Cropr.")


def test_contradictions_of_the_paper_are_stated_with_their_interval(small, tmp_path):
    published = tmp_path / "other.csv"
    lines = ["row,quantity,value,source,confidence", "none,top1,80,x,R", "cropr,top1,82.5,x,R", "random,top1,84,x,R"]
    published.write_text("\n".join([*lines, "tome,top1,70,x,R", ""]))
    sentence = text.against_paper(load(small(published=str(published))))
    # Random above None: 8.5 to 10.5 points; above Cropr likewise; Cropr against None is open. ToMe was not measured.
    assert "Of 3 pairs of rows that the paper puts in an order by Top-1, 0 have the same order here" in sentence
    assert "1 are undecided, 2 are contradicted. **This scale contradicts the paper in:**" in sentence
    assert "- Random minus Cropr: -8.8 [-11.9, -5.6] points here, +1.5 in the paper" in sentence
    assert "one seed decides none" in text.against_paper(load(small(seeds=1)))
    agreed = text.against_paper(load(small()))
    assert "Of 1 pair of rows" in agreed
    assert "contradicts the paper in" not in agreed
    assert "No two rows" in text.against_paper(load(small(published=None)))


def test_one_seed_sentences_decide_nothing(small):
    artefact = load(small(seeds=1))
    assert "none of them is decided" in text.accuracy(artefact)
    assert "these shares have no interval" in text.relevance(artefact)
    assert "| Seeds | one (no intervals over seeds) |" in setting.setting(artefact)
    verdict = text.verdicts([claims.judge(claim(), artefact)])
    assert verdict.startswith("Of 1 claim, 1 is undecided.")
    assert "`seeds=3`" in verdict


def test_sentences_without_any_records(small):
    rows = json.loads(small().read_text())["rows"][-1:]
    artefact = load(small(rows=rows, published=None))
    assert text.accuracy(artefact) == "No Top-1 was measured at this scale."
    assert text.speed(artefact) == "No throughput of Cropr was measured at this scale."
    assert text.relevance(artefact) == "No record at this scale says where the kept patches lie."
    assert text.paper_says(artefact) == "**The paper** gives no numbers for this."
    assert text.rerun_row(artefact) == ""
    assert text.coverage(artefact).startswith("0 of 1 rows")


def test_scope_says_what_a_scale_is_good_for(small):
    assert "mean nothing" in setting.scope(load(small(scale="ci")))
    assert "the order of methods, not the numbers" in setting.setting(load(small()))
    assert "not the numbers" not in setting.scope(load(small(scale="paper")))


def test_published_numbers_never_carry_another_schedule(ci):
    artefact = ci[1]["imagenet_methods"]
    assert "R=9" not in text.paper_says(artefact)
    shown = with_paper_schedule(artefact, "R=50 @ 6,12,18")
    assert "85.5 % (Cropr (R=50 @ 6,12,18, LLF))" in text.paper_says(shown)


def test_rerun_commands(small):
    artefact = load(small())
    assert "`snakemake --cores all imagenet_methods --config scale=tiny seeds=2`" in text.rerun(artefact)
    assert "seeds=3 row=imagenet_methods/cropr -- compare`" in text.rerun_row(artefact)
