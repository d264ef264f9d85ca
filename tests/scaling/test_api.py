"""The public API of the package: every name resolves, and importing it loads nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import scaling


@pytest.mark.parametrize("name", scaling.__all__)
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    assert getattr(scaling, name) is not None
    assert f"`{name}`" in str(scaling.__doc__)


def test_importing_the_package_is_light() -> None:
    code = "import sys, scaling; print(sorted({'torch', 'numpy', 'msgspec', 'scaling.spec'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        scaling.trian  # noqa: B018
