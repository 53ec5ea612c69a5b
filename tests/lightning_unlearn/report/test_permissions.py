"""What fields say of a licence and of training is shown as it stands there."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_unlearn.report.permissions import LONGEST, permission_of


@pytest.mark.parametrize(
    ("metadata", "kind", "words"),
    [
        ({"license": "notAllowed"}, "forbids", "license: notAllowed"),
        ({"licence": "CC-BY-NC-4.0"}, "restricts", "licence: CC-BY-NC-4.0"),
        ({"license": "CC BY-NC-ND"}, "restricts", "license: CC BY-NC-ND"),
        ({"Rights": "© 2024, all rights reserved"}, "restricts", "Rights: © 2024, all rights reserved"),
        ({"license": "Apache-2.0"}, "says", "license: Apache-2.0"),
        ({"license": "CC-BY-4.0"}, "says", "license: CC-BY-4.0"),
        ({"noAI": True}, "forbids", "noAI: true"),
        ({"no_ai": "yes"}, "forbids", "no_ai: yes"),
        ({"opt-out": 1}, "forbids", "opt-out: 1"),
        ({"robots": "noai, noimageai"}, "forbids", "robots: noai, noimageai"),
        ({"tdm-reservation": 1}, "forbids", "tdm-reservation: 1"),
        ({"ai_training": "not allowed"}, "forbids", "ai_training: not allowed"),
        ({"DataMining": "DMI-PROHIBITED-AIMLTRAINING"}, "forbids", "DataMining: DMI-PROHIBITED-AIMLTRAINING"),
        (
            {"cawg.training-mining": {"entries": {"cawg.ai_generative_training": {"use": "notAllowed"}}}},
            "forbids",
            "cawg.training-mining entries cawg.ai_generative_training use: notAllowed",
        ),
        (
            {"c2pa.ai_training": [{"use": "constrained", "constraint_info": "ask"}]},
            "restricts",
            "c2pa.ai_training use: constrained",
        ),
        # A ban of something else than training, and names that only sound like one.
        (
            {"license": "CC BY 4.0; redistribution without attribution prohibited"},
            "restricts",
            "license: CC BY 4.0; redistribution without attribution prohibited",
        ),
        (
            {"license": "All uses allowed, trademark use forbidden"},
            "restricts",
            "license: All uses allowed, trademark use forbidden",
        ),
        ({"license": "CC BY 4.0, AI training prohibited"}, "forbids", "license: CC BY 4.0, AI training prohibited"),
        ({"rights": "No AI"}, "forbids", "rights: No AI"),
        ({"license": "CC0 (Volcano AI)"}, "says", "license: CC0 (Volcano AI)"),
        ({"rights": "© Milano AI Studio, free for any use"}, "says", "rights: © Milano AI Studio, free for any use"),
        ({"license": "CC0, AI training is not prohibited"}, "says", "license: CC0, AI training is not prohibited"),
        (
            {"license_url": "https://creativecommons.org/licenses/by-nc/4.0/"},
            "restricts",
            "license_url: https://creativecommons.org/licenses/by-nc/4.0/",
        ),
        ({"licenceUri": "https://a.example/by/4.0/"}, "says", "licenceUri: https://a.example/by/4.0/"),
        # The strictest of several.
        ({"license": "CC0", "noai": True}, "forbids", "noai: true"),
    ],
)
def test_what_is_said_is_shown_as_it_stands(metadata: dict[str, Any], kind: str, words: str) -> None:
    found = permission_of({"captions": ["one"], **metadata})
    assert found is not None
    assert (found.kind, found.words) == (kind, words)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"noAI": False},
        {"noAI": "false"},
        {"license": ""},
        {"license": None},
        {"ai_training": "allowed"},
        {"training": "allowed, not prohibited"},
        {"cawg.ai_training": {"use": "allowed"}},
        {"source": "a site where nothing is prohibited"},
        {"title": "training is not allowed"},
        {"size": 1},
        {"captions": ["license: notAllowed", {"noai": True}]},
    ],
)
def test_nothing_is_made_of_fields_that_say_nothing(metadata: dict[str, Any]) -> None:
    assert permission_of({"captions": ["one"], **metadata}) is None


def test_a_long_licence_is_cut() -> None:
    found = permission_of({"license": "x" * 300})
    assert found is not None
    assert len(found.words) == LONGEST
    assert found.words.endswith("…")
