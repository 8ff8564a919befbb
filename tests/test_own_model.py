"""`curvlab measure --model`: the numbers are compared with those of the library on the same objects; names, checkpoints and
mistakes are behavioural."""

import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import curvlab as cl
from curvlab.cli import main

SOURCE = """
    import torch
    from torch import nn

    print("the user's code prints this")

    def make_model():
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 3))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 3)
        def forward(self, x):
            return self.head(x)

    def make_data():
        g = torch.Generator().manual_seed(1)
        x = torch.randn(40, 6, generator=g)
        return x, x[:, :3].argmax(1)

    pairs = [make_data()]
    ready = Net()
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)

    def own_loss(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    def wide(width): return nn.Linear(width, 3)
    def narrow(): return nn.Linear(5, 3)
    def pair(): return 1, 2
    def broken(): return undefined
    def nothing(): return []
"""
MODEL = ["measure", "--model", "mine.net:make_model", "--data", "mine.net:make_data"]


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch):
    """The current directory has a package of the user's, which leaves no trace afterwards."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("")
    (tmp_path / "mine" / "net.py").write_text(textwrap.dedent(SOURCE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("mine", "script", "needy", "torn"):
            del sys.modules[name]


def trained(seed=5):
    """A model at a point that no factory makes, with statistics of its own in the buffers."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model(torch.randn(64, 6))
    return model


def data():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=g)
    return x, x[:, :3].argmax(1)


def measured(capsys, *options):
    assert main([*MODEL, "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def values(found):
    return {name: m["value"] for name, m in found["measurements"].items()}


def test_the_numbers_are_those_of_the_library(capsys):
    torch.save(trained().state_dict(), "weights.pt")
    asked = ["loss", "sharpness", "instability", "expected_loss_difference"]
    options = ["--checkpoint", "weights.pt", "--batch-size", "8", "--lr", "0.3", "--seed", "4", "--diagnostics", *asked]
    found = measured(capsys, *options)
    L = cl.Objective(trained(), "cross_entropy", data())
    expected = cl.measure(L, asked, batch_size=8, lr=0.3, seed=4)
    assert values(found) == {name: m.value for name, m in expected.items()}
    assert main([*MODEL, *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith("weights.pt, N = 40, P = 99, b = 8, 2/lr = 6.6667\n")
    assert "prints this" not in out


def test_settings_are_those_of_the_objective(capsys):
    torch.save(trained().state_dict(), "weights.pt")
    settings = "--parameters 3.* --population-size 200 --dtype float64 --chunk-size 7 --memory 1GiB --device cpu"
    options = [*settings.split(), "--loss", "mine.net:smooth", "--checkpoint", "weights.pt"]
    found = measured(capsys, *options, "--diagnostics", "loss", "sharpness", "layer_parameter_norm")
    L = cl.Objective(
        trained(), nn.CrossEntropyLoss(label_smoothing=0.1), data(), parameters="3.*", population_size=200,
        dtype=torch.float64, chunk_size=7, memory="1GiB", device="cpu",
    )  # fmt: skip
    expected = cl.measure(L, ["loss", "sharpness"])
    assert values(found)["sharpness"] == expected["sharpness"].value
    assert values(found)["loss"] == expected["loss"].value
    assert found["measurements"]["layer_parameter_norm"]["axis"][1] == ["3"]


def test_without_a_batch_size_what_needs_none_is_measured(capsys):
    assert list(measured(capsys)["measurements"]) == ["loss", "gradient_norm", "sharpness"]
    with_b = measured(capsys, "--batch-size", "4", "8")["measurements"]
    assert with_b["instability"]["axis"] == ["batch_size", [4, 8]]


def test_the_same_command_gives_the_same_numbers(capsys):
    assert values(measured(capsys)) == values(measured(capsys))
    assert values(measured(capsys, "--seed", "1"))["loss"] != values(measured(capsys))["loss"]


@pytest.mark.parametrize("model", ["mine.net:ready", "mine.net:Net"])
@pytest.mark.parametrize("loss", ["mine.net:own_loss", "torch.nn:CrossEntropyLoss", "cross_entropy"])
def test_objects_classes_and_functions_are_all_named_alike(capsys, model, loss):
    options = ["--model", model, "--data", "mine.net:pairs", "--loss", loss, "--json", "--diagnostics", "loss"]
    torch.save({"head.weight": torch.ones(3, 6), "head.bias": torch.tensor([1.0, 2.0, 3.0])}, "ones.pt")
    assert main(["measure", *options, "--checkpoint", "ones.pt"]) == 0
    out = json.loads(capsys.readouterr().out)
    targets = data()[1]
    expected = nn.functional.cross_entropy(torch.tensor([1.0, 2.0, 3.0]).expand(40, 3), targets)
    assert values(out)["loss"] == pytest.approx(float(expected), rel=1e-5)


WRAPPED = {
    "plain": lambda model: model.state_dict(),
    "model": lambda model: {"model": model.state_dict(), "step": 7, "loss": torch.tensor(0.5)},
    "state_dict": lambda model: {"state_dict": model.state_dict(), "global_step": 7},
    "model_state_dict": lambda model: {"model_state_dict": model.state_dict(), "epoch": 3},
    "distributed": lambda model: nn.DataParallel(model).state_dict(),
    "compiled": lambda model: torch.compile(model).state_dict(),
    "both": lambda model: {"model": nn.DataParallel(torch.compile(model)).state_dict(), "step": 7},
    "inside": lambda model: nn.Sequential(*(torch.compile(part) for part in model)).state_dict(),
    "lightning": lambda model: {
        "state_dict": {f"model.{k}": v for k, v in model.state_dict().items()} | {"metric.count": torch.ones(2)},
        "global_step": 7,
    },
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_state_dict_is_found_where_scripts_and_frameworks_put_it(capsys, kind):
    torch.save(WRAPPED[kind](trained()), "saved.pt")
    assert main([*MODEL, "--json", "--checkpoint", "saved.pt", "--diagnostics", "loss"]) == 0
    out, err = capsys.readouterr()
    expected = cl.measure(cl.Objective(trained(), "cross_entropy", data()), ["loss"])["loss"].value
    found = json.loads(out)
    assert values(found)["loss"] == expected
    assert found["step"] == (7 if kind in ("model", "state_dict", "both", "lightning") else None)
    assert ("left out of saved.pt, being outside of the model: metric.count" in err) == (kind == "lightning")


def test_the_end_of_a_run_of_curvlab_is_a_checkpoint(capsys):
    model = trained()
    L = cl.Objective(model, "cross_entropy", data())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    list(cl.train(L, sgd, cl.Batches(40, 8, steps=3), diagnostics=["loss"], run="run", checkpoint_every=1))
    expected = cl.measure(cl.Objective(model, "cross_entropy", data()), ["loss"])["loss"].value
    found = measured(capsys, "--checkpoint", "run/final.pt", "--diagnostics", "loss")
    assert (found["step"], values(found)["loss"]) == (3, expected)
    assert measured(capsys, "--checkpoint", "run/checkpoint.pt")["step"] == 2
    other = ["measure", "--model", "mine.net:Net", "--data", "mine.net:make_data", "--checkpoint", "run/final.pt"]
    assert main(other) == 2
    assert "run/final.pt has 99 parameters, and the model 21; make the model of that run" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_fit_is_refused_with_a_list(capsys):
    state = trained().state_dict()
    state["0.weight"] = torch.zeros(7, 6)
    state["extra"] = state.pop("3.bias")
    torch.save(state, "odd.pt")
    assert main([*MODEL, "--checkpoint", "odd.pt"]) == 2
    assert (
        "odd.pt does not fit the model; missing: 3.bias; not in the model: extra; shapes differ: 0.weight is (7, 6) and "
        "should be (8, 6). Make the model that was saved"
    ) in capsys.readouterr().err
    torch.save({f"x{i}": torch.zeros(1) for i in range(9)}, "odd.pt")
    assert main([*MODEL, "--checkpoint", "odd.pt"]) == 2
    assert "x5 and 3 more" in capsys.readouterr().err


def test_damaged_and_foreign_files_are_refused(capsys):
    torch.save(trained().state_dict(), "weights.pt")
    whole = Path("weights.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(trained().state_dict()["0.weight"].numpy().tobytes())] ^= 1
    cases = {
        whole[:1000]: "damaged, or was not written by torch.save (it is no archive",
        bytes(flipped): "damaged, or was not written by torch.save (weights/",
        b"": "damaged, or was not written by torch.save (it is no archive",
    }
    for content, message in cases.items():
        Path("odd.pt").write_bytes(content)
        assert main([*MODEL, "--checkpoint", "odd.pt"]) == 2
        assert message in capsys.readouterr().err
    for content, message in (
        (trained(), "odd.pt holds more than tensors and plain values, such as a whole model, and is not read; save"),
        ([torch.zeros(1)], "odd.pt holds a list; expected a state dict"),
        ({"step": 3, "complete": True}, "odd.pt holds no state dict; expected one, or one under state_dict, "),
    ):
        torch.save(content, "odd.pt")
        assert main([*MODEL, "--checkpoint", "odd.pt"]) == 2
        assert message in capsys.readouterr().err
    assert main([*MODEL, "--checkpoint", "nowhere.pt"]) == 2
    assert "nowhere.pt does not exist; --checkpoint is a file of torch.save" in capsys.readouterr().err


def test_what_fails_while_a_state_is_put_into_the_model_is_told(capsys, there):
    (there / "torn.py").write_text(
        textwrap.dedent("""
        from torch import nn
        class Net(nn.Linear):
            def __init__(self):
                super().__init__(6, 3)
            def _load_from_state_dict(self, *_):
                raise RuntimeError("it is not to be")
        """)
    )
    torch.save(nn.Linear(6, 3).state_dict(), "weights.pt")
    options = ["--model", "torn:Net", "--data", "mine.net:make_data", "--checkpoint", "weights.pt"]
    assert main(["measure", *options]) == 2
    assert "loading weights.pt failed: RuntimeError: it is not to be" in capsys.readouterr().err


NET, DATA = "mine.net:make_model", "mine.net:make_data"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "measure takes a run or a model: curvlab measure RUN, or curvlab measure --model package.module:make_model"),
        (["runs/a", "--model", NET, "--data", DATA], "measure takes a run or a model"),
        (["--model", NET], f"--model {NET} needs data: add --data package.module:make_data"),
        (["runs/a", "--dtype", "float64", "--loss", "token"], "--loss, --dtype: settings of a model of one's own"),
        (["--model", "mine.net", "--data", DATA], "--model is 'mine.net'; expected package.module:make_model, with a colon"),
        (["--model", NET, "--data", "mine.net"], "--data is 'mine.net'; expected package.module:make_data, with a colon"),
        (["--model", "./mine/net.py:make_model", "--data", DATA], "name the module, not its file: mine.net:make_model"),
        (["--model", "yours.net:make_model", "--data", DATA], "there is no module 'yours' in "),
        (["--model", "mine.nat:make_model", "--data", DATA], "there is no module 'mine.nat' in "),
        (["--model", "mine.net:make_modle", "--data", DATA], "mine.net has no 'make_modle'; it has make_model"),
        (["--model", "mine.net:Net.zzz", "--data", DATA], "mine.net has no 'zzz'; it has forward"),
        (["--model", "mine.net:wide", "--data", DATA], "--model mine.net:wide(width) needs arguments, and curvlab calls it"),
        (["--model", "mine.net:pair", "--data", DATA], "--model mine.net:pair gave a tuple; expected a torch.nn.Module"),
        (["--model", "mine.net:broken", "--data", DATA], "mine.net:broken() failed: NameError: name 'undefined' is not"),
        (["--model", NET, "--data", "mine.net:nothing"], "data holds no batch"),
        (["--model", NET, "--data", "mine.net:pair"], "the tensors of a batch have shapes []"),
        (["--model", "mine.net:narrow", "--data", DATA], "narrow on mine.net:make_data with loss cross_entropy failed: "),
        (["--model", NET, "--data", DATA, "--loss", "focal"], "loss is 'focal'; expected one of"),
        (["--model", NET, "--data", DATA, "--loss", "mine.net:lss"], "mine.net has no 'lss'; it has "),
        (["--model", NET, "--data", DATA, "--device", "abacus"], "device 'abacus' cannot be used: "),
        (["--model", NET, "--data", DATA, "--parameters", "head.*"], "picks none of the trainable parameters"),
        (["--model", NET, "--data", DATA, "--diagnostics", "instability"], "instability needs batch_size"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line_and_the_fix(options, message, capsys):
    assert main(["measure", *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("curvlab")]) == 1


def test_modules_that_fail_say_where(there, capsys):
    (there / "needy.py").write_text("x = 1\nimport a_package_that_is_not_there\n")
    (there / "script.py").write_text("import sys\nsys.exit(3)\n")
    for module, message in (
        ("needy", "importing needy failed: ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ("script", "put what a script runs under if __name__ == '__main__'"),
    ):
        assert main(["measure", "--model", f"{module}:make", "--data", DATA]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert f"{module}.py, line 2)" in err


def test_the_engines_of_its_products_are_timed(capsys):
    own = ["bench", "hvp", "--model", "mine.net:Net", "--data", "mine.net:make_data", "--rounds", "1"]
    assert main([*own, "--json", "--products", "3", "--points", "2", "--chunk-size", "20"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["objective"]["model"] == "Net"
    assert found["objective"]["chunk_size"] == 20
    speeds = {s["name"]: s for s in found["speeds"]}
    assert list(speeds) == ["graph", "traced", "double_backward", "forward_over_reverse", "differences"]
    advice, best = found["recommendation"], speeds[found["recommendation"]["engine"]]
    assert advice["seconds"] == pytest.approx(
        best["setup"] + 2 * (best["first"]["median"] + 3 * best["product"]["median"])
    )
    assert main([*own, "--engines", "graph", "traced"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("mine.net:Net, N = 40, P = 21\n")
    assert 'engine="' in out
    assert "forward_over_reverse" not in out
