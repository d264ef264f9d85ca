"""The public names of the package."""

import subprocess
import sys

import pytest

import analysis


@pytest.mark.parametrize("name", analysis.__all__)
def test_every_public_name_is_found(name: str) -> None:
    assert getattr(analysis, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fit_tables'"):
        analysis.fit_tables  # noqa: B018


def test_importing_the_package_loads_neither_pandas_nor_torch() -> None:
    code = "import analysis, sys; assert not {'pandas', 'numpy', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
