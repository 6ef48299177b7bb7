"""Adam with FusedAdam's state layout: PyTorch's numbers, an integer step per group, exact resume."""

import copy

import pytest
import torch

from moba_megatron.platform.adam import Adam

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def problem() -> tuple[list[torch.nn.Parameter], torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(5, 3), (7,), ()]]
    return parameters, torch.randn(7, generator=generator)


def train(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], target: torch.Tensor, steps: int):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (parameters[0].sum() * parameters[1] - target).square().mean() + parameters[2] ** 2
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(("adam_w_mode", "theirs"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_equals_pytorch(adam_w_mode, theirs):
    (ours, target), (others, _) = problem(), problem()
    train(Adam(ours, adam_w_mode=adam_w_mode, **SETTINGS), ours, target, 20)
    train(theirs(others, fused=True, **SETTINGS), others, target, 20)
    assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


def test_state_layout_is_that_of_fused_adam():
    parameters, target = problem()
    optimizer = Adam(parameters, **SETTINGS)
    train(optimizer, parameters, target, 3)
    state = optimizer.state_dict()
    assert [group["step"] for group in state["param_groups"]] == [3]
    assert all(set(entry) == {"exp_avg", "exp_avg_sq"} for entry in state["state"].values())


def test_resume_is_exact():
    parameters, target = problem()
    optimizer = Adam(parameters, **SETTINGS)
    train(optimizer, parameters, target, 5)
    saved, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in parameters]
    train(optimizer, parameters, target, 5)

    resumed = [torch.nn.Parameter(weight) for weight in weights]
    second = Adam(resumed, **SETTINGS)
    second.load_state_dict(saved)
    train(second, resumed, target, 5)
    assert all(torch.equal(a, b) for a, b in zip(parameters, resumed, strict=True))


def test_a_graph_of_the_optimizer_is_refused():
    """megatron-core from 0.17 on passes `capturable`."""
    parameters, _ = problem()
    Adam(parameters, capturable=False, **SETTINGS)
    with pytest.raises(ValueError, match="capturable = True .* needs FusedAdam"):
        Adam(parameters, capturable=True, **SETTINGS)


def test_parameters_without_gradient_stay():
    parameters, _ = problem()
    optimizer = Adam(parameters, **SETTINGS)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert optimizer.state_dict()["state"] == {}


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"betas = \(1\.0, 0\.9\)"):
        Adam(problem()[0], betas=(1.0, 0.9))
