"""The value that stands for the activations: what is elementwise is exact, all else is an error in every pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nspec


class Block(nn.Module):
    """``between`` runs between fc1 and fc2."""

    def __init__(self, between: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self._between = nn.Linear(8, 64), nn.Linear(64, 8), between

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self._between(self.fc1(x)))


def specialised(between: Callable[[Any], Any]) -> tuple[nn.Module, Tensor]:
    """The model, and what it should give for ones."""
    model, active = Block(between).double(), torch.arange(64) % 3 == 0
    x = torch.ones(5, 8, dtype=torch.float64)
    want = model.fc2(F.linear(x, model.fc1.weight * active[:, None], model.fc1.bias).relu())
    return nspec.specialize(model, nspec.NeuronMasks({"a": {"fc1": active}})), want


def test_relu_by_any_name_and_what_does_nothing_pass() -> None:
    passing: dict[str, Callable[[Any], Any]] = {
        "module": nn.ReLU(),
        "in place": nn.ReLU(inplace=True),
        "in place, the value used on": lambda h: (F.relu_(h), h)[1],
        "method": lambda h: h.relu(),
        "twice": lambda h: torch.relu(torch.relu_(h)),
        "dropout of 0": lambda h: F.dropout(h.relu(), 0.0),
        "dropout in evaluation": lambda h: nn.Dropout(0.5).eval()(h.relu()),
        "a move to where it is": lambda h: (
            h.relu().to("cpu").to(torch.float64).contiguous().type_as(torch.ones(1).double())
        ),
    }
    for name, between in passing.items():
        model, want = specialised(between)
        for grad in (True, False, True):
            with nspec.task(model, "a"), torch.set_grad_enabled(grad):
                torch.testing.assert_close(model(torch.ones(5, 8).double()), want, rtol=0, atol=1e-12, msg=name)


def test_it_says_what_the_activations_would_be() -> None:
    seen: list[Any] = []
    model, _ = specialised(lambda h: (seen.append(h), h.relu())[1])
    with nspec.task(model, "a"):
        model(torch.ones(2, 3, 8).double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.float()(torch.ones(2, 3, 8))
    assert [(h.shape, h.dim(), h.size(-1), h.numel(), h.dtype, h.device.type) for h in seen] == [
        (torch.Size([2, 3, 64]), 3, 64, 384, dtype, "cpu") for dtype in (torch.float64, torch.bfloat16)
    ]


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "dropout": (lambda h: F.dropout(h.relu(), 0.1), "p=0.1"),
    "another dropout": (lambda h: F.alpha_dropout(h.relu(), 0.2, True), "p=0.2"),
    "noise": (lambda h: F.rrelu(h, training=True), "rrelu"),
    "a part": (lambda h: h.relu()[..., :8], "__getitem__"),
    "a list": (lambda h: torch.cat([h.relu()]), "calls cat"),
    "a look at the values": (lambda h: h.relu() if h.sum() > 0 else h, r"Tensor\.sum"),
    "a softmax": (lambda h: F.softmax(h, -1), "calls softmax"),
    "a sum over neurons before them": (lambda h: h.cumsum(-1), r"Tensor\.cumsum"),
    "the largest": (lambda h: h.topk(3, -1).values, r"Tensor\.topk"),
    "another order": (lambda h: h.flip(-1), r"Tensor\.flip"),
    "other columns": (lambda h: h.view(10, 32), "mixes neurons"),
    "other dimensions": (lambda h: h.transpose(0, 1), r"calls Tensor\.transpose \(it depends on the dimensions\)"),
    "a sum over tokens": (lambda h: h.cumsum(1), r"Tensor\.cumsum \(it depends on the dimensions\)"),
    "token by token": (lambda h: h.unbind(1), r"Tensor\.unbind \(it depends on the dimensions\)"),
    "more dimensions": (lambda h: h * torch.full((1, 1, 1), 2.0), r"__mul__ with another tensor, of shape \[1, 1, 1\]"),
    "two half as wide": (lambda h: h.relu().chunk(2, -1)[0], r"Tensor\.chunk"),
    "a norm": (lambda h: F.layer_norm(h.relu(), (64,)), "layer_norm"),
    "a gated unit": (lambda h: F.glu(h), "calls glu"),
    "another tensor": (lambda h: h * torch.ones(64).double(), "__mul__ with another tensor"),
    "another tensor before it": (lambda h: torch.ones(64).double() + h, "add.* with another tensor"),
    "a product of each with each": (lambda h: h.T @ h, r"reads Tensor\.T"),
    "gradients switched off": (torch.no_grad()(torch.tanh), "switches gradients off"),
    "a weight": (lambda h: F.linear(torch.ones(1, 64), h.relu()), "as weights"),
    "a layer before fc2": (lambda h: nn.Linear(32, 64)(h.relu()), r"shape \[64, 32\]"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_everything_else_is_an_error_that_names_layer_and_operation_in_every_pass(what: str) -> None:
    between, names = REFUSED[what]
    model, _ = specialised(between)
    for training in (True, True, False, False):
        with (
            nspec.task(model.train(training), "a"),
            pytest.raises(ValueError, match=f"^fc1: .*is not elementwise.*{names}"),
        ):
            model(torch.ones(5, 8).double())


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_layer_is_checked_too(fullgraph: bool) -> None:
    for between in (lambda h: F.softmax(h, -1), lambda h: F.dropout(h.relu(), 0.5)):
        torch._dynamo.reset()
        model, _ = specialised(between)
        compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
        with (
            nspec.task(model, "a"),
            pytest.raises((ValueError, torch._dynamo.exc.TorchDynamoException), match="not elementwise"),
        ):
            compiled(torch.ones(5, 8).double())


def test_an_empty_batch_proves_nothing_and_an_error_leaves_nothing_behind() -> None:
    between = nn.ReLU()
    model, want = specialised(lambda h: between(h))
    with nspec.task(model, "a"):
        assert model(torch.ones(0, 8).double()).shape == (0, 8)
        between = nn.Softmax(-1)
        with pytest.raises(ValueError, match="calls softmax"):
            model(torch.ones(5, 8).double())
        between = nn.ReLU()
        torch.testing.assert_close(model(torch.ones(5, 8).double()), want)


def test_hooks_may_look_at_it_and_may_not_mix_it() -> None:
    model, want = specialised(torch.relu)
    shapes: list[torch.Size] = []
    model.fc1.register_forward_hook(lambda module, inputs, h: shapes.append(h.shape))
    with nspec.task(model, "a"):
        torch.testing.assert_close(model(torch.ones(5, 8).double()), want)
        assert shapes == [torch.Size([5, 64])]
        hook = model.fc1.register_forward_hook(lambda module, inputs, h: h * torch.ones(64).double())
        with pytest.raises(ValueError, match="__mul__ with another tensor"):
            model(torch.ones(5, 8).double())
        hook.remove()


def test_activations_that_a_hook_puts_in_their_place_go_through_fc2_as_they_are() -> None:
    """Only the rows of fc1 are masked: fc2 of anything else is fc2."""
    model, _ = specialised(torch.relu)
    patch = torch.rand(5, 64, dtype=torch.float64)
    model.fc1.register_forward_hook(lambda module, inputs, h: patch)
    with nspec.task(model, "a"):
        torch.testing.assert_close(model(torch.ones(5, 8).double()), F.linear(patch, model.fc2.weight, model.fc2.bias))


def test_what_fc1_read_may_not_change_before_fc2_takes_it() -> None:
    """The block is computed when fc2 is called: with other inputs or weights it would be another."""
    changes: dict[str, Callable[[nn.Module, Tensor], Any]] = {
        "input": lambda model, x: x.add_(1),
        "weight": lambda model, x: model.fc1.weight.mul_(2),
        "bias": lambda model, x: model.fc1.bias.zero_(),
    }
    for what, change in changes.items():
        x = torch.ones(5, 8).double()
        model, _ = specialised(torch.relu)
        model._between = lambda h, args=(model, x), change=change: (change(*args), h.relu())[1]
        with nspec.task(model, "a"), torch.no_grad(), pytest.raises(ValueError, match="in place between the two"):
            model(x)
            pytest.fail(f"a changed {what} goes unnoticed")
    with nspec.task(model, "a"), torch.no_grad():
        h = model.fc1(torch.ones(5, 8).double()).abs()
        model.fc1.bias.add_(1)  # no longer what the others give
        model.fc2(h)
        doubled = model.fc1(torch.ones(5, 8).double()).view(1, 5, 64)
        doubled.compute()
        model.fc1.bias.add_(1)
        with pytest.raises(ValueError, match="changes the bias of fc1 in place"):
            model.fc2(doubled)


@pytest.mark.parametrize("tasks", ["a", ["a", None, "a", "a", None]])
@pytest.mark.parametrize("how", ["inference", "weights of inference", "compiled", "compiled with gradients", "broken"])
def test_where_writes_are_not_counted_the_block_is_that_of_what_fc1_read(how: str, tasks: Any) -> None:
    torch._dynamo.reset()
    kept: dict[str, Any] = {}
    act: Any = torch._dynamo.disable(F.gelu) if how == "broken" else F.relu

    def between(h: Any) -> Any:
        h = act(h)
        with torch.no_grad():
            kept["x"].mul_(0.5)
            if how != "inference":  # there the bias is an ordinary tensor, whose writes are counted
                kept["bias"].mul_(3)
                kept["weight"].add_(1)
        return h

    class Residual(Block):
        def forward(self, x: Tensor) -> Tensor:
            kept.update(x=x + 0, bias=self.fc1.bias, weight=self.fc1.weight)
            return super().forward(kept["x"])

    active, x = torch.arange(64) % 3 == 0, torch.randn(5, 8)
    with torch.inference_mode(how == "weights of inference"):
        model = Residual(between)
    with torch.no_grad():
        rows = torch.stack([active | (one is None) for one in ([tasks] * 5 if isinstance(tasks, str) else tasks)])
        h = torch.where(rows, model.fc1(x), model.fc1.bias)
        want = model.fc2(F.gelu(h) if how == "broken" else h.relu())
    nspec.specialize(model, nspec.NeuronMasks({"a": {"fc1": active}}))
    compiled = how in ("compiled", "compiled with gradients", "broken")
    run = torch.compile(model, backend="aot_eager", fullgraph=how != "broken") if compiled else model
    with (
        torch.inference_mode(not compiled),
        torch.set_grad_enabled(how.endswith("gradients")),
        nspec.task(model, tasks),
    ):
        torch.testing.assert_close(run(x), want)


@pytest.mark.parametrize("grad", [True, False])
def test_gradients_and_autocast_are_those_of_fc1(grad: bool) -> None:
    model, _ = specialised(torch.relu)
    x = torch.ones(5, 8).double()
    with nspec.task(model, "a"):
        with torch.set_grad_enabled(grad):
            h = model.fc1(x)
        with torch.set_grad_enabled(not grad), pytest.raises(ValueError, match="switches gradients"):
            model.fc2(torch.relu(h))
        h = model.fc1(x).relu()
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="switches autocast"):
            model.fc2(h)


def test_a_layer_that_widens_its_activations_under_autocast_is_as_without_that() -> None:
    """T5 and its kin cast them to the dtype of fc2.weight, and autocast casts them back."""
    found = []
    for between in (torch.relu, lambda h: torch.relu(h).to(torch.float32)):
        model, _ = specialised(between)
        with nspec.task(model.float(), "a"), torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(model(torch.ones(5, 8)))
    assert torch.equal(*found)


def test_hooks_that_would_miss_their_values_are_told_of(recwarn: pytest.WarningsRecorder) -> None:
    model, _ = specialised(nn.ReLU())
    x = torch.ones(5, 8).double()
    for register in (model.fc1.register_full_backward_hook, model.fc1.register_full_backward_pre_hook):
        handle = register(lambda *_: None)
        with (
            nspec.task(model, "a"),
            pytest.raises(ValueError, match="^fc1 has backward hooks, and there is no gradient"),
        ):
            model(x)
        handle.remove()
    assert not recwarn.list
    model.fc1.register_forward_hook(lambda module, inputs, h: h * 0 if isinstance(h, Tensor) else None)
    for _ in range(3):
        with nspec.task(model, "a"):
            model(x)
    assert ["which get a value that stands for its activations" in str(w.message) for w in recwarn] == [True]


def test_hooks_of_all_modules_that_would_miss_their_values_are_told_of(recwarn: pytest.WarningsRecorder) -> None:
    model, _ = specialised(nn.ReLU())
    x = torch.ones(5, 8).double()
    of_all = nn.modules.module
    for register in (of_all.register_module_full_backward_hook, of_all.register_module_full_backward_pre_hook):
        handle = register(lambda *_: None)
        with nspec.task(model, "a"), pytest.raises(ValueError, match="^fc1 has backward hooks, those of all modules"):
            model(x)
        handle.remove()
    handle = of_all.register_module_forward_hook(lambda module, inputs, y: None)
    for _ in range(3):
        with nspec.task(model, "a"):
            model(x)
    handle.remove()
    told = ["which get a value that stands for its activations" in str(w.message) for w in recwarn]
    assert sum(told) == 1


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return -dy


def test_a_function_with_a_gradient_of_its_own_and_a_checkpoint_of_fc2_alone_are_refused() -> None:
    model, _ = specialised(Reversal.apply)
    x = torch.ones(5, 8).double()
    with nspec.task(model, "a"):
        with pytest.raises(ValueError, match="gives them to Reversal, a torch.autograd.Function"):
            model(x)
        for reentrant in (True, False):
            h = torch.relu(model.fc1(x))
            if not reentrant:
                torch.utils.checkpoint.checkpoint(model.fc2, h, use_reentrant=False).sum().backward()
                continue
            with pytest.raises((ValueError, TypeError), match="gives them to CheckpointFunction"):
                torch.utils.checkpoint.checkpoint(model.fc2, h, use_reentrant=True)


def test_a_copy_is_not_rectified_with_its_original() -> None:
    for copy in (lambda h: h.clone(), lambda h: h.to(torch.float64, copy=True)):
        model, _ = specialised(lambda h, copy=copy: [copy(h), F.relu_(h)][0])
        want = model.fc2(
            F.linear(torch.ones(5, 8).double(), model.fc1.weight * (torch.arange(64) % 3 == 0)[:, None], model.fc1.bias)
        )
        with nspec.task(model, "a"):
            torch.testing.assert_close(model(torch.ones(5, 8).double()), want)


@pytest.mark.parametrize("grad", [True, False])
def test_a_batch_without_tokens(grad: bool) -> None:
    model, _ = specialised(torch.relu)
    for switch in ("a", ["a", "a"]):
        with nspec.task(model, switch), torch.set_grad_enabled(grad):
            assert model(torch.ones(2, 0, 8).double()).shape == (2, 0, 8)


def both(between: Callable[[Any], Any], bias: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of a block under a task, and of the block with masked rows, by PyTorch alone."""
    model, active = Block(between).double(), torch.arange(64) % 3 == 0
    if not bias:
        model.fc1.bias = None
    x = torch.randn(5, 8, dtype=torch.float64).requires_grad_()
    leaves = [x, *model.parameters()]
    want = model.fc2(between(F.linear(x, model.fc1.weight * active[:, None], model.fc1.bias)))
    theirs = [want, *torch.autograd.grad(want.square().sum(), leaves)]
    nspec.specialize(model, nspec.NeuronMasks({"a": {"fc1": active}}))
    with nspec.task(model, "a"):
        found = model(x)
        return [found, *torch.autograd.grad(found.square().sum(), leaves)], theirs


def in_place(h: Any) -> Any:
    h *= 2
    h.add_(0.5)
    return F.silu(h, inplace=True)


ELEMENTWISE: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda h: h,
    "gelu": F.gelu,
    "relu and a square": lambda h: torch.square(F.relu(h)),
    "relu times a number": lambda h: torch.relu(h) * 2,
    "in place": in_place,
    "sigmoid of it times it": lambda h: h * torch.sigmoid(1.702 * h),
    "gelu as a sum of powers": lambda h: (
        0.5 * h * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))
    ),
    "laplace": lambda h: 0.5 * (1.0 + torch.erf((h - 0.707107) / (0.282095 * math.sqrt(2.0)))),
    "mish": F.mish,
    "hardswish": F.hardswish,
    "leaky": lambda h: F.leaky_relu(h, 0.1),
    "prelu": nn.PReLU(),  # its parameter gets a gradient too, from the constants as well
    "prelu of both signs": lambda h: torch.prelu(h, torch.full((1,), -0.5).double()),
    "log of a sigmoid": F.logsigmoid,
    "reflected operators": lambda h: 1 - 2 / (2 + h * h) + 2**h,
    "a threshold": lambda h: h * (h > 0.5),
    "a choice": lambda h: torch.where(h > 0, h, 0.1 * h),
    "limits": lambda h: h.clamp(-1, max=1) + torch.minimum(h, 0.3 * h),
    "a constant part": lambda h: h * h.detach(),
    "one number of a tensor": lambda h: h * torch.tensor(3.0, dtype=torch.float64) + torch.ones(1).double(),
    "one number in as many dimensions": lambda h: F.gelu(h.view(1, 5, 64)).mul_(torch.full((1, 1, 1), 3.0)).view(5, 64),
    "other leading dimensions": lambda h: F.gelu(h.view(1, -1, 64)).reshape(5, 64),
    "a cast": lambda h: h.float().double() * 0 + h.to(torch.float64),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("what", ELEMENTWISE)
def test_elementwise_functions_are_exact_with_every_gradient(what: str, bias: bool) -> None:
    ours, theirs = both(ELEMENTWISE[what], bias)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tasks", ["a", ["a", None, "a"]])
def test_prelu_with_a_parameter_of_each_neuron_is_refused_with_its_reason_and_one_is_not(tasks: Any) -> None:
    x = torch.randn(3, 5, 8).double()
    for parameters in (1, 5):
        model, active = Block(nn.PReLU(parameters)).double(), torch.arange(64) % 3 == 0
        masked = lambda some, model=model, active=active: model.fc2(
            model._between(F.linear(x[some : some + 1], model.fc1.weight * active[:, None], model.fc1.bias))
        )
        want = torch.cat([masked(0), model(x[1:2]) if tasks != "a" else masked(1), masked(2)])
        nspec.specialize(model, nspec.NeuronMasks({"a": {"fc1": active}}))
        for grad in (True, False):
            with nspec.task(model, tasks), torch.set_grad_enabled(grad):
                if parameters == 1:
                    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-12)
                else:
                    with pytest.raises(ValueError, match="^fc1: PReLU has 5 parameters .* take nn.PReLU"):
                        model(x)


def test_padding_columns_stay_out_of_every_gradient() -> None:
    """A function that has no value at 0 would make the gradient of a padded column none."""
    ours, theirs = both(lambda h: torch.log(h * h) + 1 / h)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_view_that_was_changed_in_place_elsewhere_is_not_used() -> None:
    for between in (
        lambda h: (h.view(1, 5, 64).relu_(), h)[1],
        lambda h: (v := h.reshape(1, 5, 64), h.mul_(2), v)[2],
        lambda h: (h.detach().exp_(), h)[1],
    ):
        model, _ = specialised(between)
        with nspec.task(model, "a"), pytest.raises(ValueError, match="another view of them was changed in place"):
            model(torch.ones(5, 8).double())
