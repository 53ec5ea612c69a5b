"""The icon sets of the icons' bench: which files of which npm packages, under which licence, and what is in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class IconSet:
    """One set of icons, as npm has it.

    Attributes:
        package: Its name and version there.
        licence: Of the icons, as the package's own licence file says, in SPDX's words.
        copyright: The line that the licence asks to keep.
        outlined: Where an icon drawn in lines lies; ``{}`` stands for its name.
        filled: Where the filled one lies.
        boxed: Whether what has no filled form (an arrow) comes as a filled box around it.
    """

    package: str
    licence: str
    copyright: str
    outlined: Sequence[str]
    filled: Sequence[str] = ()
    boxed: bool = field(default=False)


# Left out: remixicon (package.json says Apache-2.0, the licence file forbids icon sets) and css.gg (no derivatives).
SETS: Mapping[str, IconSet] = {
    "tabler": IconSet(
        "@tabler/icons@3.52.0",
        "MIT",
        "Copyright (c) 2020-2026 Paweł Kuna",
        ["icons/outline/{}.svg"],
        ["icons/filled/{}.svg"],
        boxed=True,
    ),
    "lucide": IconSet(
        "lucide-static@1.62.0", "ISC", "Copyright (c) 2026 Lucide Icons and Contributors", ["icons/{}.svg"]
    ),
    "bootstrap": IconSet(
        "bootstrap-icons@1.13.2",
        "MIT",
        "Copyright (c) 2019-2024 The Bootstrap Authors",
        ["icons/{}.svg"],
        ["icons/{}-fill.svg"],
    ),
    "phosphor": IconSet(
        "@phosphor-icons/core@2.1.1",
        "MIT",
        "Copyright (c) 2023 Phosphor Icons",
        ["assets/regular/{}.svg", "assets/bold/{}-bold.svg"],
        ["assets/fill/{}-fill.svg"],
        boxed=True,
    ),
    "feather": IconSet("feather-icons@4.29.2", "MIT", "Copyright (c) 2013-2023 Cole Bemis", ["dist/icons/{}.svg"]),
    "ionicons": IconSet(
        "ionicons@8.1.0",
        "MIT",
        "Copyright (c) 2015-present Ionic (http://ionic.io/)",
        ["dist/svg/{}-outline.svg"],
        ["dist/svg/{}.svg"],
    ),
    "heroicons": IconSet(
        "heroicons@2.2.0",
        "MIT",
        "Copyright (c) Tailwind Labs, Inc.",
        ["24/outline/{}.svg"],
        ["24/solid/{}.svg"],
    ),
    "pictogrammers": IconSet(
        "@mdi/svg@7.4.47", "Apache-2.0", "Pictogrammers", ["svg/{}-outline.svg"], ["svg/{}.svg"], boxed=True
    ),
    "fluent": IconSet(
        "@fluentui/svg-icons@1.1.343",
        "MIT",
        "Copyright (c) Microsoft Corporation",
        ["icons/{}_24_regular.svg"],
        ["icons/{}_24_filled.svg"],
    ),
    "carbon": IconSet(
        "@carbon/icons@11.89.0",
        "Apache-2.0",
        "IBM Corporation",
        ["svg/32/{}.svg"],
        ["svg/32/{}--filled.svg"],
        boxed=True,
    ),
    "octicons": IconSet(
        "@primer/octicons@19.42.0",
        "MIT",
        "Copyright (c) 2026 GitHub Inc.",
        ["build/svg/{}-24.svg"],
        ["build/svg/{}-fill-24.svg"],
    ),
    "iconoir": IconSet(
        "iconoir@7.12.1",
        "MIT",
        "Copyright (c) 2021 Luca Burgio",
        ["icons/regular/{}.svg"],
        ["icons/solid/{}.svg"],
    ),
    "boxicons": IconSet(
        "boxicons@2.1.4",
        "MIT",
        "Copyright (c) 2015-2021 Aniket Suvarna",
        ["svg/regular/bx-{}.svg"],
        ["svg/solid/bxs-{}.svg"],
    ),
    "material": IconSet(
        "@material-design-icons/svg@0.14.15",
        "Apache-2.0",
        "Google LLC",
        ["outlined/{}.svg"],
        ["filled/{}.svg", "sharp/{}.svg"],
    ),
    "eva": IconSet("eva-icons@1.1.3", "MIT", "Akveo", ["outline/svg/{}-outline.svg"], ["fill/svg/{}.svg"]),
    "fontawesome": IconSet(
        "@fortawesome/fontawesome-free@7.3.1",
        "CC-BY-4.0",
        "Copyright (c) 2026 Fonticons, Inc. (https://fontawesome.com)",
        ["svgs/regular/{}.svg"],
        ["svgs/solid/{}.svg"],
    ),
}

# What can be seen to its names in the sets, the first that is there; and what there is in lines alone.
FILLED_TOO: Mapping[str, Sequence[str]] = {
    "heart": ["heart", "favorite"],
    "star": ["star"],
    "house": ["house", "home"],
    "moon": ["moon", "half-moon", "weather_moon", "dark_mode"],
    "cloud": ["cloud"],
    "bell": ["bell", "notifications", "notification", "alert"],
    "lightning bolt": ["lightning", "flash", "zap", "lightning-bolt", "bolt"],
    "lock": ["lock", "locked", "lock-closed", "lock_closed"],
    "person": ["person", "user", "account"],
    "bookmark": ["bookmark"],
    "flag": ["flag"],
    "clock": ["clock", "time", "schedule"],
    "drop of water": ["droplet", "drop", "water_drop", "water", "rain-drop"],
}
LINES_ALONE: Mapping[str, Sequence[str]] = {
    "arrow pointing up": ["arrow-up", "arrow_up", "arrow_upward"],
    "arrow pointing down": ["arrow-down", "arrow_down", "arrow_downward"],
    "arrow pointing left": ["arrow-left", "arrow_back", "arrow-back", "arrow_left"],
    "arrow pointing right": ["arrow-right", "arrow_forward", "arrow-forward", "arrow_right"],
    "check mark": ["check", "checkmark"],
    "cross": ["x", "close", "x-lg", "x-mark", "xmark", "dismiss"],
    "magnifying glass": ["search", "magnifying-glass", "magnify"],
}
