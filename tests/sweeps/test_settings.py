"""``--set TABLE.KEY=VALUE``: as strict as the file."""

import pytest

from scaling.errors import UserError
from sweeps.config.campaign import load_campaign
from sweeps.config.toml import override


def test_a_setting_replaces_a_value() -> None:
    campaign = load_campaign("quick", settings=["training.batch_tokens=512", "placement.device=cpu", "seeds=[7]"])
    assert campaign.training.batch_tokens == 512
    assert campaign.placement["device"] == "cpu"
    assert campaign.seeds == (7,)


def test_a_misspelt_setting_is_refused() -> None:
    with pytest.raises(UserError, match="batch_tokens"):
        load_campaign("quick", settings=["training.batch_token=512"])


@pytest.mark.parametrize("setting", ["threads", "=3", "a b=1", "placement.$(x)=1", "name.first=1"])
def test_a_malformed_setting_is_refused(setting: str) -> None:
    with pytest.raises(UserError, match="set"):
        override({"name": "quick"}, setting)
