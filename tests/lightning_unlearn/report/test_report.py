from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from report_toys import Page, chromium, encoded_picture, needs_browser, sample_of, table_of

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.errors import InputError
from lightning_unlearn.report import ranking
from lightning_unlearn.report.report import MEMBERS, shown_queries, write_report
from lightning_unlearn.report.words import duration, number
from lightning_unlearn.scores.table import ScoreTable

EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }}",
    "&lt;b&gt;",
]


# ---------------------------------------------------------------------- a run, and its page taken apart


def _page(folder: Path, table: ScoreTable, queries: Sequence[Sample] = (), samples: Any = None, **options: Any) -> str:
    def fetch(keys: frozenset[str]) -> Iterator[Sample]:
        yield from (
            sample_of(key) if samples is None else samples[key] for key in keys if samples is None or key in samples
        )

    return write_report(folder / "report.html", table, queries, fetch, **options).read_text("utf-8")


def _pictures(page: str) -> list[Image.Image]:
    addresses = [image["src"] for image in Page(page).all("img")]
    return [Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))) for address in addresses]


def _evil_page(folder: Path) -> str:
    """Two queries and six images with everything a shard may hold of hostile texts, and of pictures and none."""
    keys = [f"{number}{text}" for number, text in enumerate([*EVIL, "z" * 300])]
    noise = torch.Generator().manual_seed(0)
    samples = {
        key: sample_of(
            key,
            *[EVIL[number % 5], "word" * 60, "a second caption"][: 1 + number % 3],
            latent=torch.rand(3, 16, 16, generator=noise) * 2 - 1 if number % 2 else torch.full((4, 8, 8), 3.0),
            picture=encoded_picture(300 + number, 90, "jpeg") if number % 3 else None,
        )
        for number, key in enumerate(keys)
    }
    facts = {"seed": 4, "scheduler": EVIL[1], EVIL[0]: EVIL[0], "nested": {EVIL[2]: [EVIL[3]]}, "path": "/x" * 200}
    queries = [
        sample_of("query" + EVIL[0], *EVIL, picture=encoded_picture(64, 64), **facts),
        sample_of("query" + EVIL[1], "word" * 60, latent=torch.full((4, 8, 8), 3.0)),
    ]
    scores = np.linspace(-1e-6, 2e-3, 12).reshape(6, 2)
    table = table_of(
        scores,
        keys,
        [query.key for query in queries],
        precision=EVIL[0],
        rule=EVIL[0],
        versions={EVIL[0]: EVIL[1]},
        fingerprints={"weights": EVIL[0], "deltas": "0" * 64},
    )
    return _page(folder, table, queries, samples, top=4)


# ---------------------------------------------------------------------- safe and alone


def test_no_caption_key_metadata_or_setting_becomes_markup(tmp_path: Path) -> None:
    page = Page(_evil_page(tmp_path))
    assert page.all("script") == [{}]  # the one that searches
    assert not page.all("b")
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    for text in EVIL:
        assert page.text.count(text) >= 3
    assert EVIL[0] in [attributes["alt"].removeprefix("Query ") for attributes in page.all("img")]


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    table = table_of(np.linspace(-1, 2, 40).reshape(20, 2))
    page = _page(tmp_path, table, [sample_of("query-0", picture=encoded_picture(200, 200)), sample_of("query-1")])
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    parsed = Page(page)
    assert not [tag for tag, _ in parsed.tags if tag in ("link", "iframe", "object", "embed", "base", "form")]
    for _, attributes in parsed.tags:
        for name in ("src", "href", "xlink:href", "srcset", "poster", "data", "background"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), attributes
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    policy = next(meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-")


def test_ids_are_unique_and_every_reference_inside_the_page_has_its_aim(tmp_path: Path) -> None:
    page = _page(tmp_path, table_of(np.random.default_rng(0).standard_normal((50, 3))))
    parsed = Page(page)
    ids = Counter(attributes["id"] for _, attributes in parsed.tags if "id" in attributes)
    assert max(ids.values()) == 1
    aims = [
        attributes[name][1:] for _, attributes in parsed.tags for name in ("href", "xlink:href") if name in attributes
    ]
    aims += re.findall(r"url\(#([^)]*)\)", page)
    aims += [attributes["aria-labelledby"] for _, attributes in parsed.tags if "aria-labelledby" in attributes]
    assert len(aims) > 6
    assert set(aims) <= set(ids)


def test_one_run_gives_one_page_byte_for_byte_whatever_matplotlib_is_set_to(tmp_path: Path) -> None:
    table = table_of(np.random.default_rng(0).standard_normal((50, 2)))
    first = _page(tmp_path, table)
    settings = {"axes.facecolor": "red", "font.size": 30.0, "svg.fonttype": "path", "axes.grid": True}
    with matplotlib.rc_context(settings):
        assert _page(tmp_path, table) == first
        assert matplotlib.rcParams["font.size"] == 30


def test_plots_take_their_colours_and_font_from_the_page(tmp_path: Path) -> None:
    page = _page(tmp_path, table_of(np.random.default_rng(0).standard_normal((50, 1))))
    plot = page[page.index("<svg") : page.index("</svg>")]
    for ink in ("--bulk", "--accent", "--line", "--muted"):
        assert f"var({ink})" in plot
    assert not re.findall(r"#[0-9a-f]{6}\b", plot)
    assert "50 training images" in plot.split(">")[0]
    assert not re.search(r"\b(width|height)=", plot.split(">")[0])


def _schemes(page: str) -> list[dict[str, str]]:
    blocks = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    return [dict(re.findall(r"--(\w+): (#[0-9a-f]+);", block)) for block in blocks]


def _contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        shares = np.array([int(digits[place : place + 2], 16) for place in (0, 2, 4)]) / 255
        linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_the_contrast_that_wcag_asks_for_in_light_and_dark(tmp_path: Path) -> None:
    schemes = _schemes(_page(tmp_path, table_of([1.0])))
    assert len(schemes) == 2
    for colours in schemes:
        for ink in ("ink", "muted", "accent"):
            assert _contrast(colours[ink], colours["paper"]) >= 4.5
        assert _contrast(colours["muted"], colours["ground"]) >= 4.5
        assert _contrast(colours["accent"], colours["bulk"]) >= 2  # shown and other images in the plot


# ---------------------------------------------------------------------- what it says


def test_each_query_lists_its_top_images_in_the_order_of_the_table_ties_included(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    keys = [f"image-{number:02d}" for number in rng.permutation(30)]  # a table need not be sorted
    table = table_of(rng.integers(0, 4, (30, 2)) / 8, keys)
    page = _page(tmp_path, table, top=7, bottom=0)
    found = re.findall(r'<li value="(\d+)">.*?value="([^"]*)".*?class="key">([^<]*)<', page, re.DOTALL)
    expected = [
        (str(rank), str(score), key)
        for query in table.queries
        for rank, (key, score) in enumerate(table.top(query, 7), start=1)
    ]
    assert found == expected


def _sets(members: dict[str, list[str]], **run: Any) -> ScoreTable:
    table = table_of(np.linspace(-1, 2, 5 * len(members)).reshape(5, -1), None, list(members), **run)
    for name, keys in members.items():
        about = table.run["targets"][name]
        del about["captions"]
        about["members"] = keys
    return table


def test_a_set_shows_its_first_members_and_how_many_there_are(tmp_path: Path) -> None:
    members = {"Klee": ["b", "d"], "Marc": [f"m{number}" for number in range(1200)]}
    table = _sets(members)
    assert [shown_queries(table, name) for name in members] == [["b", "d"], members["Marc"][:MEMBERS]]
    shown = [sample_of(key, picture=encoded_picture(20, 10)) for keys in members.values() for key in keys[:MEMBERS]]
    page = _page(tmp_path, table, shown)
    parsed = Page(page)
    alternatives = [image["alt"] for image in parsed.all("img") if image["alt"].startswith("Query")]
    assert alternatives == [f"Query caption of {sample.key}" for sample in shown]
    assert [page.count(f"caption of {key}</p>") for key in ("b", "d", "m0", "m5", "m6")] == [1, 1, 1, 1, 0]
    assert f"The first {MEMBERS} of 1,200 queries that were unlearned together." in parsed.text
    assert "queries 2" in parsed.text
    assert "queries 1,200" in parsed.text
    assert "Each set was unlearned:" in parsed.text
    assert "2 sets · 5 training images" in parsed.text
    assert "Set’s loss before" in parsed.text
    assert "Query’s loss" not in parsed.text
    # In the contents, a set is shown by its first picture.
    assert len(_pictures(page)) == len(shown) + 2 + 10


def test_a_set_of_which_nothing_is_found_is_shown_by_its_members_keys(tmp_path: Path) -> None:
    # A set may be called as one of the queries, or as a sample.
    page = Page(_page(tmp_path, _sets({"image-0000": ["one", "two" + EVIL[0]]}), [sample_of("image-0000")]))
    assert f"Query two{EVIL[0]}: no picture" in page.text
    assert "caption of image-0000" not in [image.get("alt", "").removeprefix("Query ") for image in page.all("img")]
    assert "these pictures possible" in page.text


@pytest.mark.parametrize("stored", [True, False])
def test_a_query_with_a_region_is_faint_outside_of_it(stored: bool, tmp_path: Path) -> None:
    mask = torch.zeros(2, 2)
    mask[0] = 1
    dark = io.BytesIO()
    Image.new("RGB", (40, 40)).save(dark, "png")
    sample = replace(
        sample_of("query-0", latent=-torch.ones(3, 40, 40), picture=dark.getvalue() if stored else None), mask=mask
    )
    table = table_of([1.0, 2.0])
    table.run["targets"]["query-0"]["region"] = 0.5
    page = _page(tmp_path, table, [sample])
    pixels = np.asarray(_pictures(page)[0].convert("L"))
    assert (pixels[:20] == 0).all()
    assert (pixels[20:] > 180).all()
    assert "region 50.0 % of it" in Page(page).text.replace("\u00a0", " ")


def test_a_shown_image_has_its_rank_score_captions_key_base_loss_and_alternative_text(tmp_path: Path) -> None:
    samples = {"image-0000": sample_of("image-0000", "a red fox", "a fox, red", "fox")}
    page = Page(_page(tmp_path, table_of([4.56e-5]), samples=samples))
    assert "Rank 1 score +45.6 a red fox 2 more captions a fox, red fox image-0000 base loss 0.500" in page.text
    assert "scores in units of 10⁻⁶" in page.text
    assert "Training image a red fox" in [image["alt"] for image in page.all("img")]


def test_a_query_has_its_prompt_how_it_was_made_and_how_its_loss_rose(tmp_path: Path) -> None:
    query = sample_of(
        "query-0", "a fox on Mars", "another", seed=17, scheduler="DDIM", steps=40, guidance=7.5, extra={"x": [1, 2]}
    )
    text = Page(_page(tmp_path, table_of([1.0]), [query])).text
    assert "a fox on Mars" in text
    assert "All 2 prompts a fox on Mars another key query-0 seed 17 scheduler DDIM steps 40 guidance 7.5" in text
    assert "extra x [1, 2]" in text
    assert "Query’s loss before 0.0200 Query’s loss after 0.0220 Rise +10.0 % Fisher penalty of the change" in text
    assert "the change, ½ δᵀFδ 3.20 × 10⁻⁵" in text


def test_a_query_whose_step_was_stopped_says_so_and_why(tmp_path: Path) -> None:
    table = table_of([[1.0, 2.0], [3.0, 4.0]])
    table.run["targets"]["query-1"]["out_of_range"] = ["linear", "length", "a reason of another version"]
    page = _page(tmp_path, table)
    assert page.count('class="caution"') == 1
    assert (
        "reached the end of the range in which it means something: its loss rises far less than its slope says; its "
        "delta gets far longer than the weights; a reason of another version. Look at its scores with doubt."
    ) in Page(page).text


def test_a_query_without_a_sample_or_a_result_is_shown_with_what_the_run_knows(tmp_path: Path) -> None:
    text = Page(_page(tmp_path, table_of([[1.0, 2.0]], targets={"query-0": {"captions": ["only recorded"]}}))).text
    assert "only recorded" in text
    assert "query-1" in text
    assert "Rise" not in text


def test_the_effect_on_everything_else_is_told_relative_to_base_losses(tmp_path: Path) -> None:
    unlearned = np.array([0.4, 0.5, 0.55, 0.6, 0.75])
    base = 0.5
    expected = (
        "The loss rose for 60.0 % of the training images and fell for 20.0 %. "
        "The median change is +10.0 % of an image’s own base loss; nine in ten lie between −16.0 % and +44.0 %"
    )
    assert expected in Page(_page(tmp_path, table_of(unlearned - base))).text
    ratios = (unlearned - base) / (unlearned + base)
    assert expected in Page(_page(tmp_path, table_of(ratios, rule="ratio"))).text


def test_of_a_rule_that_is_not_known_no_change_of_the_loss_is_claimed(tmp_path: Path) -> None:
    text = Page(_page(tmp_path, table_of([1.0, 2.0], rule="racing"))).text
    assert "median" not in text
    assert "by the rule “racing”" in text


def test_a_query_that_only_shares_its_key_with_a_training_picture_is_not_taken_for_it(tmp_path: Path) -> None:
    query = sample_of("image-0001")
    text = Page(_page(tmp_path, table_of([3.0, 1.0, 2.0], queries=[query.key]), [query])).text
    assert "(the query itself)" not in text
    assert "ranks number" not in text


def test_a_training_picture_as_the_query_is_told_its_own_rank(tmp_path: Path) -> None:
    query = sample_of("copy", of="image-0001")
    text = Page(_page(tmp_path, table_of([3.0, 1.0, 2.0], queries=[query.key]), [query])).text
    assert "ranks number 3 of 3" in text
    assert text.count("(the query itself)") == 1
    assert "image-0001 (the query itself)" in text


def test_the_least_influential_are_the_last_ones_and_never_those_at_the_top(tmp_path: Path) -> None:
    def keys(page: str) -> list[str]:
        return re.findall(r'class="key">([^<]*)<', page)

    scores = [float(number) for number in range(8)]
    page = _page(tmp_path, table_of(scores), top=3, bottom=2)
    assert keys(page) == ["image-0007", "image-0006", "image-0005", "image-0001", "image-0000"]
    assert re.findall(r'<li value="(\d+)">', page) == ["1", "2", "3", "7", "8"]
    page = _page(tmp_path, table_of(scores), top=7, bottom=4)
    assert len(keys(page)) == 8
    assert "Least influential" not in _page(tmp_path, table_of(scores), top=8)


def test_settings_versions_fingerprints_counts_and_time_stand_at_the_end(tmp_path: Path) -> None:
    text = Page(_page(tmp_path, table_of(np.zeros(123)), top=2)).text
    end = text[text.rindex("How it was made") :]
    for words in (
        "training images 123 shards 1 scoring took 1 min 15 s processes 2 precision 32-true score rule difference",
        "strategy newton",
        "class Toy scheduler beta start 0.0001",
        "timesteps 8 captions all",
        "torch 2.13.0",
        "weights 0123456789abcdef",
    ):
        assert words in end
    meaning = text[text.index("What a score means", text.index("Most influential")) : text.rindex("How it was made")]
    assert meaning.count(".") == 7  # three sentences, and what it does not say
    assert "Compare ranks, not sizes" in meaning


def test_a_table_with_missing_shards_says_so(tmp_path: Path) -> None:
    assert "1 of 2 shards" in Page(_page(tmp_path, table_of([1.0], shards={"shard-a": {}, "shard-b": {}}))).text


def test_several_queries_have_contents_with_thumbnails_and_a_single_one_has_none(tmp_path: Path) -> None:
    several = _page(tmp_path, table_of([[1.0, 2.0]]), [sample_of("query-0", "first"), sample_of("query-1", "second")])
    contents = several[several.index("<nav") : several.index("</nav>")]
    assert Page(contents).text == "first second"
    assert [link["href"] for link in Page(contents).all("a")] == ["#query-1", "#query-2"]
    assert [image["alt"] for image in Page(contents).all("img")] == ["", ""]
    assert "<nav" not in _page(tmp_path, table_of([1.0]), [sample_of("query-0")])


def test_samples_are_asked_for_once_and_only_those_that_are_shown_or_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def fetch(keys: frozenset[str]) -> list[Sample]:
        calls.append(sorted(keys))
        return []

    monkeypatch.setattr(ranking, "MOST_LOOKED_AT", 8)
    table = table_of(np.stack([np.arange(100.0), -np.arange(100.0)], 1))
    path = write_report(tmp_path / "report.html", table, [], fetch, top=2, bottom=1)
    # Four first ones of each, among which near-copies are looked for, and the last ones, which are among these.
    assert calls == [[f"image-{row:04d}" for row in (0, 1, 2, 3, 96, 97, 98, 99)]]
    assert Page(path.read_text()).text.count("not found in the shards") == 6


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.00231, "0.00231"),
        (0.1, "0.100"),
        (-2.0, "−2.00"),
        (123.4, "123"),
        (12345.0, "1.23 × 10⁴"),
        (-2.31e-7, "−2.31 × 10⁻⁷"),
        (9.999e-13, "1.00 × 10⁻¹²"),
    ],
)
def test_numbers_have_three_digits_and_powers_of_ten_where_they_need_them(value: float, text: str) -> None:
    assert number(value).replace("\N{NO-BREAK SPACE}", " ") == text
    assert number(value, sign=True).startswith("+" if value > 0 else text[0])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (2.345, "2.35 s"), (59.7, "1 min 0 s"), (75.2, "1 min 15 s"), (7322.0, "2 h 2 min")],
)
def test_durations_are_told_in_their_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---------------------------------------------------------------------- how firm scores are


def test_scores_with_errors_show_them_with_the_ranks_that_they_leave_open(tmp_path: Path) -> None:
    table = table_of(np.array([9.0, 5.0, 4.5, 1.0, 0.5]) * 1e-6, flips="max")
    firm = replace(table, errors=np.float32([[1e-6], [0.4e-6], [0.3e-6], [0.1e-6], [5e-6]]))
    text = Page(_page(tmp_path, firm, top=3, bottom=1)).text
    # 9 ± 1 lies above all; 5 ± 0.4 meets 4.5 ± 0.3 and 0.5 ± 5.
    assert "Rank 1 score +9.00 rank is firm ± 1.00 caption of image-0000" in text
    assert "Rank 2 score +5.00 ranks 2 to 4 ± 0.400 caption of image-0001" in text
    assert "Rank 5 score +0.500 ranks 2 to 5 ± 5.00 caption of image-0004" in text
    assert "The number after ± is half of a score’s 95 % interval, for other draws of timesteps and noise." in text
    assert "score rule difference flips taken by max" in text


def test_that_shared_noise_makes_orders_firmer_is_said_only_of_shared_noise(tmp_path: Path) -> None:
    errors = np.float32([[0.1], [0.1]])
    for noise in ("shared", "per_sample"):
        table = replace(table_of([2.0, 1.0], views={"noise": noise}), errors=errors)
        assert ("firmer than their intervals" in Page(_page(tmp_path, table)).text) == (noise == "shared")


def test_scores_without_errors_show_nothing_of_them(tmp_path: Path) -> None:
    text = Page(_page(tmp_path, table_of([2.0, 1.0]))).text
    for words in ("±", "rank is firm", "ranks 1 to", "interval"):
        assert words not in text


def test_errors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    table = replace(table_of([2.0, 1.0]), errors=np.float32([[0.1], [np.nan]]))
    with pytest.raises(InputError, match="NaN or infinity"):
        _page(tmp_path, table)


# ---------------------------------------------------------------------- odd runs


@pytest.mark.filterwarnings("error")  # Matplotlib warns of axes without extent
@pytest.mark.parametrize(
    "scores",
    [
        np.zeros(20),
        np.full(20, 3e-7),
        np.full(20, -5.0),
        np.array([1e-30]),
        np.array([-1.0, 1.0]),
        np.array([1e30, -1e30, 0.0]),
        1.0 + np.arange(20) * 2.0**-23,
        np.random.default_rng(0).standard_cauchy(5000) * 1e-4,
    ],
    ids=["zeros", "equal", "equal negative", "one", "two", "huge", "nearly equal", "heavy tails"],
)
def test_scores_of_any_spread_give_a_plot_and_no_odd_number(
    tmp_path: Path, scores: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "MOST_LOOKED_AT", 50)
    page = _page(tmp_path, table_of(scores))
    text = Page(page[page.index("<body") :]).text.lower()
    assert not re.search(r"\b(nan|inf|none|e[+-]?\d\d)\b", text)
    plot = page[page.index("<svg") : page.index("</svg>")]
    assert "nan" not in plot
    assert plot.count("var(--bulk)") == plot.count("var(--accent)") - 1 == 1  # a silhouette each, and the label


def test_a_million_samples_make_a_page_no_larger_than_a_few_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "MOST_LOOKED_AT", 50)
    scores = np.random.default_rng(0).standard_t(3, 1_000_000) * 1e-5
    page = _page(tmp_path, table_of(scores))
    assert "1,000,000 training images" in page
    assert len(page) < 100_000


def test_half_a_surrogate_pair_and_control_characters_do_no_harm(tmp_path: Path) -> None:
    page = _page(tmp_path, table_of([1.0]), [sample_of("query-0", "broken \ud83d\x00\x1b caption")])
    assert "broken ?" in page


def test_a_table_that_can_not_be_shown_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing to report.*score some first\.$"):
        _page(tmp_path, table_of(np.zeros((0, 1))))
    with pytest.raises(InputError, match=r"NaN or infinity; score again"):
        _page(tmp_path, table_of([1.0, np.nan]))
    with pytest.raises(InputError, match=r"at least one image.*top is 0"):
        _page(tmp_path, table_of([1.0]), top=0)
    assert not list(tmp_path.iterdir())


def test_a_place_that_can_not_be_written_is_named_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"can't be written to .*file/report.html .*name another place\.$"):
        _page(tmp_path / "file", table_of([1.0]))


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken(keys: frozenset[str]) -> Iterator[Sample]:
        raise InputError("no such shard")

    _page(tmp_path / "new", table_of([1.0]), [sample_of("query-0", "first")])
    with pytest.raises(InputError, match="no such shard"):
        write_report(tmp_path / "new" / "report.html", table_of([1.0]), [sample_of("query-0", "second")], broken)
    assert "first" in (tmp_path / "new" / "report.html").read_text()
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"report.html", "report.json", "assertion.json"}


# ---------------------------------------------------------------------- pictures


def _shown(folder: Path, sample: Sample) -> list[Image.Image]:
    return _pictures(_page(folder, table_of([1.0]), [sample], {}))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_pixel_space_sample_without_a_picture_is_shown_from_its_latent(tmp_path: Path, channels: int) -> None:
    pixels = torch.randint(0, 256, (channels, 5, 7), generator=torch.Generator().manual_seed(0))
    latent = pixels / 127.5 - 1
    latent[0, 0, 0], pixels[0, 0, 0] = 1.3, 255  # generated pixels leave [-1, 1] here and there
    page = _page(tmp_path, table_of([1.0]), [sample_of("query-0", latent=latent)], {})
    (picture,) = _pictures(page)
    assert np.array_equal(np.asarray(picture), pixels.expand(3, 5, 7).permute(1, 2, 0).numpy())
    assert next(image for image in Page(page).all("img")).get("class") == "coarse"
    assert ".coarse { image-rendering: pixelated; }" in page


@pytest.mark.parametrize(
    "latent",
    [torch.randn(4, 8, 8), torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))],
    ids=["four", "three"],
)
def test_an_autoencoders_latent_without_a_picture_is_a_neutral_tile(tmp_path: Path, latent: torch.Tensor) -> None:
    page = _page(tmp_path, table_of([1.0]), [sample_of("query-0", "a prompt", latent=latent)], {})
    assert not _pictures(page)
    assert "Query a prompt: no picture" in Page(page).text.replace(" :", ":")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_large_picture_is_made_smaller_and_a_small_one_keeps_its_size(tmp_path: Path, kind: str) -> None:
    (large,) = _shown(tmp_path, sample_of("query-0", picture=encoded_picture(1600, 400, kind)))
    assert large.size == (384, 96)
    (small,) = _shown(tmp_path, sample_of("query-0", picture=encoded_picture(100, 60, kind)))
    assert (small.size, small.format) == ((100, 60), "PNG")


def test_nothing_that_a_picture_carries_along_gets_into_the_page(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "taken at home", 6  # a description, and: turn me by a quarter
    (picture,) = _shown(tmp_path, sample_of("query-0", picture=encoded_picture(120, 60, "jpeg", exif=exif)))
    assert picture.size == (60, 120)
    assert not picture.getexif()
    assert set(picture.info) <= {"dpi"}


def test_what_is_see_through_is_seen_on_white(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(stream, "png")
    (picture,) = _shown(tmp_path, sample_of("query-0", picture=stream.getvalue()))
    assert picture.getcolors() == [(16, (255, 255, 255))]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture",
        b"<svg onload='alert(1)'/>",
        encoded_picture(64, 64)[:200],
        encoded_picture(8, 8, "gif"),
        encoded_picture(8, 8, "tiff"),
    ],
    ids=["empty", "text", "svg", "cut off", "gif", "tiff"],
)
def test_bytes_that_are_no_png_jpeg_or_webp_are_a_neutral_tile(tmp_path: Path, data: bytes) -> None:
    assert not _shown(tmp_path, sample_of("query-0", picture=data))


# ---------------------------------------------------------------------- in a browser

WIDTHS = (1280, 390)
# Put into a copy of the page: opens what is folded, waits for all pictures, and tells the page around it what it finds.
PROBE = """<script>
addEventListener("load", async () => {
  document.querySelectorAll("details").forEach(fold => { fold.open = true; });
  const images = [...document.images];
  await Promise.allSettled(images.map(image => image.decode()));
  parent.postMessage({
    width: innerWidth,
    scroll: document.documentElement.scrollWidth,
    wide: [...document.querySelectorAll("body *")].filter(one => one.scrollWidth > one.clientWidth + 1
      && getComputedStyle(one).display !== "inline" && !one.closest("svg, .hidden, .what")).map(one => one.outerHTML),
    images: images.length,
    empty: images.filter(image => !image.naturalWidth || !image.clientWidth).length,
    alarm: window.alarm === true,
    scripts: document.scripts.length,
    mode: document.compatMode,
    heading: document.querySelector("h2").textContent,
    captions: [...document.querySelectorAll(".caption")].map(one => one.textContent),
    paper: getComputedStyle(document.body).backgroundColor,
    focusable: document.querySelectorAll("a[href], summary").length,
  }, "*");
});
</script>"""
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


def _frames(folder: Path, page: str) -> Path:
    """Pages around the page at each width, since a window of headless Chromium is never narrower than 500 px."""
    alarm = "<script>window.alert = () => { window.alarm = true; };</script>"
    copy = POLICY.sub(alarm, page, count=1).replace("</body>", PROBE + "</body>")
    (folder / "copy.html").write_text(copy)
    frames = "".join(f"<iframe src='copy.html' width={width} height=900></iframe>" for width in WIDTHS)
    listen = """<script>const found = []; addEventListener("message", ({data}) => {
      found.push(data); document.body.dataset.found = encodeURIComponent(JSON.stringify(found)); });</script>"""
    path = folder / "frames.html"
    path.write_text(
        f"<!DOCTYPE html><style>body {{ margin: 0 }} iframe {{ border: 0; display: block }}</style>{listen}{frames}"
    )
    return path


def _found(dom: str) -> dict[int, dict[str, Any]]:
    from urllib.parse import unquote

    (data,) = re.findall(r'data-found="([^"]*)"', dom)
    return {found["width"]: found for found in json.loads(unquote(data))}


@needs_browser
def test_a_browser_shows_every_picture_runs_no_caption_and_scrolls_only_down(tmp_path: Path) -> None:
    page = _evil_page(tmp_path)
    found = _found(chromium(tmp_path, _frames(tmp_path, page), "--dump-dom"))
    assert sorted(found) == sorted(WIDTHS)
    for width, one in found.items():
        assert one["scroll"] <= width
        assert one["wide"] == []
        assert one["images"] == page.count("<img ") > 6
        assert one["empty"] == 0
        assert one["alarm"] is False
        assert one["scripts"] == 3  # the search, the alarm and the probe
        assert one["mode"] == "CSS1Compat"
        assert one["heading"] == EVIL[0]
        assert EVIL[1] in one["captions"]
        assert one["paper"] == "rgb(255, 255, 255)"
        assert one["focusable"] >= 8


@needs_browser
def test_the_page_lets_no_script_run_even_if_one_got_in(tmp_path: Path) -> None:
    page = _page(tmp_path, table_of([1.0]))
    intruder = "<script>document.title = 'intruder'</script></body>"
    (tmp_path / "guarded.html").write_text(page.replace("</body>", intruder))
    (tmp_path / "unguarded.html").write_text(POLICY.sub("", page).replace("</body>", intruder))
    assert "<title>intruder" in chromium(tmp_path, tmp_path / "unguarded.html", "--dump-dom")
    assert "<title>Attribution report" in chromium(tmp_path, tmp_path / "guarded.html", "--dump-dom")


@needs_browser
def test_a_screenshot_in_the_dark_is_dark_and_has_something_on_it(tmp_path: Path) -> None:
    samples = {
        f"image-{number:04d}": sample_of(f"image-{number:04d}", picture=encoded_picture(64, 64)) for number in range(20)
    }
    _page(tmp_path, table_of(np.arange(20.0)), [sample_of("query-0", picture=encoded_picture(64, 64))], samples)
    for scheme, dark in ((1, False), (0, True)):
        picture = tmp_path / f"{scheme}.png"
        flags = (
            f"--screenshot={picture}",
            "--window-size=1280,1600",
            f"--blink-settings=preferredColorScheme={scheme}",
        )
        chromium(tmp_path, tmp_path / "report.html", *flags)
        with Image.open(picture) as screenshot:
            grey = np.asarray(screenshot.convert("L"))
        assert grey.shape == (1600, 1280)
        assert (np.median(grey) < 40) is np.bool_(dark)
        assert grey.std() > 20
