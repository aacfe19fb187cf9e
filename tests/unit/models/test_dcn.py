"""The plain cross net and MLP, and the plain table, are those of TorchRec; without it the rest still loads."""

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.mlp import MLP

from features.errors import TesseraError
from models.networks import dcn
from models.table import engine as fused

WITHOUT = """
import sys
sys.modules["fbgemm_gpu"] = sys.modules["torchrec"] = None
import models.bundle.bundle, models.ranker.train, serving.ranking.service, streaming.trainer
from models.networks import dcn
from models.table.open import open_table
from models.table.reference import ReferenceTable
from tests.build import pooled_schema
from models.table.engine import engine
assert isinstance(dcn.cross_net(4, 1, 2), dcn.PlainCrossNet)
assert isinstance(open_table(pooled_schema(), learning_rate=0.1), ReferenceTable)
assert engine() == "plain"
print("loaded")
"""


def built(make: type[nn.Module], *arguments: object) -> nn.Module:
    torch.manual_seed(3)
    return make(*arguments)


@pytest.mark.parametrize(
    ("library", "plain", "arguments"),
    [(LowRankCrossNet, dcn.PlainCrossNet, (12, 2, 5)), (MLP, dcn.PlainMlp, (12, [8, 4]))],
)
def test_the_plain_layers_are_the_librarys(
    library: type[nn.Module], plain: type[nn.Module], arguments: tuple[object, ...]
) -> None:
    one, other = built(library, *arguments), built(plain, *arguments)
    assert {name: value.shape for name, value in one.state_dict().items()} == {
        name: value.shape for name, value in other.state_dict().items()
    }
    assert all(torch.equal(one.state_dict()[name], value) for name, value in other.state_dict().items())
    x = torch.randn(7, 12)
    torch.testing.assert_close(one(x), other(x), rtol=0, atol=1e-6)


def test_everything_that_serves_loads_without_fbgemm() -> None:
    found = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "loaded", found.stderr
    assert found.stderr.count("not installed: torchrec and fbgemm_gpu; the plain table and network take") == 1


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Imports of TorchRec are tried again, here and after."""
    for cached in (fused.fused, fused._say_once):
        cached.cache_clear()
    yield
    for cached in (fused.fused, fused._say_once):
        cached.cache_clear()


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("libfoo.so.3: cannot open shared object"), "do not load: ImportError: libfoo.so.3: cannot open"),
        (OSError("undefined symbol: _ZN2at"), "do not load: OSError: undefined symbol: _ZN2at"),
        (AttributeError("'_OpNamespace' 'fbgemm' object has no attribute 'x'"), "do not load: AttributeError"),
        (ModuleNotFoundError("No module named 'tensordict'", name="tensordict"), "needs tensordict, which is not"),
        (ModuleNotFoundError("…", name="torchrec.modules.mlp"), "needs torchrec.modules.mlp, which is not"),
    ],
)
def test_an_install_that_is_broken_is_an_error_and_no_reason_for_the_plain_table(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: str) -> None:
        raise error

    monkeypatch.setattr(fused, "import_module", fails)
    with pytest.raises(TesseraError, match=re.escape(said)) as caught:
        fused.engine()
    assert "pip install torchrec==" in str(caught.value)


def test_tables_and_networks_are_torchrecs_where_it_is_installed() -> None:
    assert fused.engine() == "torchrec"
    assert isinstance(dcn.cross_net(4, 1, 2), LowRankCrossNet)
    assert isinstance(dcn.mlp(4, [2]), MLP)
