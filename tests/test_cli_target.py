"""TARGET: what it may name, and what is said of one that names nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from graphopt import TargetError
from graphopt.cli.target import load_loss, load_target

MODELS = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
    def forward(self, x):
        return self.linear(x)

class Constant(torch.nn.Module):
    def forward(self, scale=1.0):
        return torch.ones(1) * scale

def with_tuple(): return Net(), (torch.ones(1, 2),)
def with_dict(): return Net(), {"x": torch.ones(1, 2)}
def with_list(): return Net(), [torch.ones(1, 2)]
def alone(): return Net()
def needs_nothing(): return Constant()
def number(): return 3
def pair(): return 3, ()
def raises(): raise RuntimeError("no weights here")
def needs(size): return Net()
def loss(output): return output.sum()
ready = Constant()
text = "not callable"
"""


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with modules in it, as a user's would be."""
    package = tmp_path / "shop"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text(MODELS)
    (package / "broken.py").write_text("import no_such_dependency")
    (package / "raising.py").write_text("raise ValueError('bad constant')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.split(".")[0] == "shop"]:
        monkeypatch.delitem(sys.modules, name)


def test_a_factory_gives_a_model_and_inputs() -> None:
    target = load_target("shop.models:with_tuple")
    assert target.name == "shop.models:with_tuple"
    assert isinstance(target.inputs, tuple)
    assert target.model(*target.inputs).shape == (1, 2)
    assert load_target("shop.models:with_dict").inputs.keys() == {"x"}  # type: ignore[union-attr]
    assert load_target("shop.models:needs_nothing").inputs == ()
    assert isinstance(load_target("shop.models:ready").model, torch.nn.Module)
    assert isinstance(load_target("shop.models:Constant").model, torch.nn.Module)


def test_a_saved_program_brings_its_inputs(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    torch.export.save(torch.export.export(model, (torch.ones(1, 2),)), tmp_path / "net.pt2")
    target = load_target("net.pt2")
    assert isinstance(target.inputs, tuple)
    torch.testing.assert_close(target.model(*target.inputs), model(torch.ones(1, 2)), rtol=0, atol=0)

    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
            return x * scale

    both = torch.export.export(Scaled(), (torch.ones(2),), {"scale": torch.ones(1)})
    torch.export.save(both, tmp_path / "both.pt2")
    with pytest.raises(TargetError, match="exported with positional and keyword arguments"):
        load_target("both.pt2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shop.models", "cannot read target 'shop.models': expected package.module:name"),
        ("shop.models:", "expected package.module:name"),
        ("shop.models:with_tupel", "'shop.models' has no 'with_tupel'; did you mean 'with_tuple'?"),
        (
            "shop.modles:alone",
            "cannot find module 'shop.modles' of target 'shop.modles'; did you mean 'shop.models'?",
        ),
        ("shpo.models:alone", "cannot find module 'shpo' of target 'shpo.models'; did you mean 'shop'?"),
        ("shop.broken:net", "importing 'shop.broken' failed: No module named 'no_such_dependency'"),
        ("shop.raising:net", "importing 'shop.raising' raised ValueError: bad constant"),
        ("shop.models:text", "'shop.models:text' is str, not a function that returns a model"),
        ("shop.models:raises", "'shop.models:raises' raised RuntimeError: no weights here"),
        ("shop.models:needs", "missing 1 required positional argument: 'size'"),
        ("shop.models:number", "'shop.models:number' returned int; expected a torch.nn.Module"),
        ("shop.models:pair", "'shop.models:pair' returned a tuple of int, tuple; expected a torch.nn.Module"),
        ("shop.models:with_list", "returned inputs of type list; expected a tuple of positional or a dict"),
        (
            "shop.models:alone",
            "gives a model without inputs, and its forward is missing a required argument: 'x'",
        ),
        ("gone.pt2", "there is no file 'gone.pt2'"),
    ],
)
def test_a_target_that_is_none(text: str, message: str) -> None:
    with pytest.raises(TargetError) as caught:
        load_target(text)
    assert message in str(caught.value)


def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"not a zip")
    with pytest.raises(TargetError, match=r"'model.pt2' is not a program that this torch can load"):
        load_target("model.pt2")
    with pytest.raises(TargetError, match=r"there is no file 'modle.pt2'; did you mean 'model.pt2'\?"):
        load_target("modle.pt2")


def test_a_loss_is_a_function() -> None:
    assert load_loss(None) is None
    found = load_loss("shop.models:loss")
    assert found is not None and found(torch.ones(2)) == 2
    with pytest.raises(TargetError, match=r"loss 'shop.models:text' is str, not a function"):
        load_loss("shop.models:text")
    with pytest.raises(TargetError, match=r"cannot read loss 'mse': expected package.module:name"):
        load_loss("mse")
