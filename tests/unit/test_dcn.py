"""The plain cross net and MLP, and the plain table, are those of TorchRec; without it the rest still loads."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from models import dcn

WITHOUT = """
import sys
sys.modules["fbgemm_gpu"] = sys.modules["torchrec"] = None
import models.bundle, models.train, serving.rank, streaming.trainer
from models import dcn
from models.table.open import open_table
from models.table.reference import ReferenceTable
from tests.build import pooled_schema
assert isinstance(dcn.cross_net(4, 1, 2), dcn.PlainCrossNet)
assert isinstance(open_table(pooled_schema(), learning_rate=0.1), ReferenceTable)
print("loaded")
"""


def built(make: type[nn.Module], *arguments: object) -> nn.Module:
    torch.manual_seed(3)
    return make(*arguments)


@pytest.mark.parametrize(
    ("library", "plain", "arguments"),
    [(dcn._CrossNet, dcn.PlainCrossNet, (12, 2, 5)), (dcn._Mlp, dcn.PlainMlp, (12, [8, 4]))],
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
