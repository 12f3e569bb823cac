"""Masked: the masks hold through everything that a training script does."""

import copy
import gc
import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparsekern as sk
from python_tests.finetune.small import adamw, batch, bits, masks_of, network, pruned, train
from python_tests.oneshot import architectures
from sparsekern.errors import FormatError
from sparsekern.finetune import SRSTE, Frozen, Magnitude, Masked, RigL
from sparsekern.finetune.schedule import make, zeros_mask
from sparsekern.finetune.tensors import pack_bits, unpack_bits

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "adam-foreach": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-3),
}


def test_without_it_the_masks_are_lost():
    """The control: the same two steps without hooks leave violations, and check counts them."""
    model = pruned()
    masked = Masked(model)
    assert masked.check() == 0
    train(model, adamw(model), 2)
    assert masked.check() > 0


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_any_optimizer_keeps_masks_and_masked_state(kind):
    model = pruned()
    masked = Masked(model)
    optimizer = masked.attach(OPTIMIZERS[kind](model.parameters()))
    before = bits(model)
    train(model, optimizer, 5)
    assert masked.check() == 0 and masked.step == 5
    assert not torch.equal(before, bits(model))
    dropped = ~masked.masks["up"]
    for key, value in optimizer.state[model.up.weight].items():
        if isinstance(value, torch.Tensor) and value.shape == model.up.weight.shape:
            assert not value[dropped].any(), key
            assert value[~dropped].any(), key


class SharpnessAware(torch.optim.Optimizer):
    """SAM as its users have it: two half steps, the second by another optimizer."""

    def __init__(self, parameters, base, **options):
        super().__init__(parameters, options)
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure):
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()


@pytest.mark.parametrize("whole", [False, True])
def test_an_optimizer_that_steps_through_another(whole):
    model = pruned()
    masked = Masked(model)
    sam = SharpnessAware(model.parameters(), torch.optim.AdamW, lr=1e-2)
    assert masked.attach(sam) is sam
    between = []

    def backward():
        between.append(masked.check())
        model(batch(0)[0]).square().mean().backward()

    for _ in range(3):
        backward()
        if whole:
            sam.step(backward)
        else:
            masked.mask_gradients()
            sam.first_step()
            backward()
            sam.second_step()
        sam.zero_grad()
    assert masked.check() == 0 and masked.step == 3 and between == [0] * 6
    with pytest.raises(ValueError, match="not attached yet"):
        masked.attach(sam.base_optimizer)


class Coded(torch.optim.Optimizer):
    """Momentum in 8 bits, code 127 for zero."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in (p for group in self.param_groups for p in group["params"]):
            state = self.state[parameter]
            codes = state.setdefault("codes", torch.full(parameter.shape, 127, dtype=torch.uint8))
            momentum = (codes.float() - 127) / 127 * state.get("most", 1.0) * 0.9 + parameter.grad
            most = state["most"] = momentum.abs().max().clamp_min(1e-9)
            codes.copy_((momentum / most * 127 + 127).round())
            parameter.sub_(momentum, alpha=self.defaults["lr"])


def test_codes_of_an_8_bit_optimizer_are_not_zeroed():
    """A zero there is the largest negative momentum."""
    model = pruned()
    masked, optimizer = Masked(model), Coded(model.parameters())
    train(model, masked.attach(optimizer), 3)
    assert masked.check() == 0
    assert (optimizer.state[model.up.weight]["codes"][~masked.masks["up"]] == 127).all()


def test_kept_weights_train_as_if_dropped_ones_did_not_exist():
    """Exactly the steps of a model whose forward multiplies by the mask."""
    model, twin = pruned(), pruned()
    masks = masks_of(twin)
    masked = Masked(model)
    optimizer = masked.attach(torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0))
    train(model, optimizer, 4)
    weights = {n: nn.Parameter(twin.get_submodule(n).weight.detach().clone()) for n in masks}
    rest = [p for n, p in twin.named_parameters() if n not in ("up.weight", "down.weight")]
    other = torch.optim.AdamW([*weights.values(), *rest], 1e-2, weight_decay=0.0)
    for step in range(4):
        x, y = batch(step)
        other.zero_grad()
        state = {f"{n}.weight": w * masks[n] for n, w in weights.items()}
        nn.functional.mse_loss(torch.func.functional_call(twin, state, (x,)), y).backward()
        other.step()
    for name, mask in masks.items():
        torch.testing.assert_close(model.get_submodule(name).weight, weights[name] * mask)


def test_clipping_counts_kept_gradients_only():
    model = pruned()
    masked = Masked(model)
    x, y = batch(0)
    nn.functional.mse_loss(model(x), y).backward()
    whole = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    masked.mask_gradients()
    assert nn.utils.get_total_norm([p.grad for p in model.parameters()]) < whole
    train(model, masked.attach(adamw(model)), 5, masked=masked, clip=0.1)
    assert masked.check() == 0


def test_ema_compile_autocast_accumulation_in_one_run():
    model = pruned()
    masked = Masked(model)
    optimizer = masked.attach(adamw(model))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(6):
        x, y = batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.mse_loss(compiled(x).float(), y) / 2
        loss.backward()
        if step % 2:
            masked.mask_gradients()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
    assert masked.step == 3 and masked.check() == 0
    assert Masked(average).check() == 0  # its own zeros imply the masks
    for name, mask in masked.masks.items():
        assert not average.module.get_submodule(name).weight[~mask].any()


def test_grad_scaler_scales_and_skips():
    model = pruned()
    masked = Masked(model, schedule=Magnitude(every=2))
    optimizer = masked.attach(adamw(model, fused=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)  # the first steps overflow
    for step in range(30):
        x, y = batch(step)
        optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(model(x), y) * 1e25).backward()
        scaler.step(optimizer)
        scaler.update()
    taken = int(optimizer.state[model.up.weight]["step"])
    assert 0 < taken < 30 and masked.step == taken
    assert masked.check() == 0 and bits(model).isfinite().all()


def test_compiled_optimizer_step():
    model = pruned()
    masked = Masked(model)
    optimizer = masked.attach(adamw(model))
    step = torch.compile(optimizer.step, backend="eager")
    for i in range(3):
        x, y = batch(i)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        step()
    assert masked.check() == 0 and masked.step == 3


def test_lbfgs_whose_gradients_come_from_a_closure():
    model = pruned()
    masked = Masked(model)
    optimizer = masked.attach(torch.optim.SGD(model.parameters(), 0.05, momentum=0.9))
    x, y = batch(0)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert masked.check() == 0
    momentum = optimizer.state[model.up.weight]["momentum_buffer"]
    assert not momentum[~masked.masks["up"]].any()


@pytest.mark.parametrize(
    "schedule",
    [None, Magnitude(every=3), SRSTE(weight_decay=2e-2, ramp=4), RigL(every=2, freeze_at=8)],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.parametrize("order", ["model masked optimizer", "optimizer masked model"])
def test_resume_is_bit_equal(schedule, order):
    """5 + 5 steps through a saved state equal 10 steps, dropout included, in any order of loading,
    though the new model has other masks until then."""
    model = pruned(dropout=0.2)
    masked = Masked(model, schedule=schedule, keep_dense=True)
    optimizer = masked.attach(adamw(model))
    torch.manual_seed(7)
    train(model, optimizer, 5)
    file = io.BytesIO()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "masked": masked.state_dict(),
        "rng": torch.get_rng_state(),
    }
    torch.save(state, file)
    train(model, optimizer, 5, first=5)

    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = pruned(seed=9, dropout=0.2)
    other = Masked(again)
    optimizer2 = other.attach(adamw(again))
    parts = {"model": again, "masked": other, "optimizer": optimizer2}
    for part in order.split():
        parts[part].load_state_dict(state[part])
    torch.set_rng_state(state["rng"])
    train(again, optimizer2, 5, first=5)
    assert torch.equal(bits(model), bits(again))
    assert other.step == masked.step == 10 and other.schedule == masked.schedule
    for name, mask in masked.masks.items():
        assert torch.equal(mask, other.masks[name])


@pytest.mark.parametrize("schedule", [Magnitude(every=2, freeze_at=6), SRSTE(2, 6, 2e-4)])
def test_straight_through_moves_masks_then_freezes(schedule):
    model = pruned()
    masked = Masked(model, schedule=schedule)
    optimizer = masked.attach(adamw(model))
    first = masked.masks
    train(model, optimizer, 6)
    moved = masked.masks
    assert any(not torch.equal(first[n], moved[n]) for n in first)
    assert masked.check() == 0
    assert all(entry.residue is None for entry in masked.entries)
    dropped = ~moved["up"]
    assert not optimizer.state[model.up.weight]["exp_avg"][dropped].any()
    train(model, optimizer, 4, first=6)
    assert all(torch.equal(moved[n], m) for n, m in masked.masks.items())
    assert masked.check() == 0


def test_sr_ste_is_the_formula():
    """One SGD step: w' = w − lr · (g(M·w) + λ·(1 − M)·w), then the two largest of each group."""
    model = network()
    dense = model.up.weight.detach().clone()
    masks = masks_of(model)
    masked = Masked(model, masks, schedule=SRSTE(weight_decay=0.1))
    optimizer = masked.attach(torch.optim.SGD(model.parameters(), 0.5))
    x, y = batch(0)
    nn.functional.mse_loss(model(x), y).backward()
    gradient = model.up.weight.grad.clone()
    optimizer.step()
    stepped = dense - 0.5 * (gradient + 0.1 * torch.where(masks["up"], 0, dense))
    mask = sk.prune.magnitude_mask(stepped)
    torch.testing.assert_close(model.up.weight.detach(), stepped * mask)
    torch.testing.assert_close(masked.entries[0].residue, stepped * ~mask)


def test_rigl_swaps_smallest_for_largest_gradient():
    schedule = RigL(every=1, freeze_at=1000, fraction=1.0)
    weight = torch.tensor([[0.5, 0.1, 0.0, 0.0, 3.0, 2.0, 0.0, 0.0]])
    gradient = torch.tensor([[9.0, 9.0, 0.2, 0.7, 0.0, 0.0, 0.0, 0.0]])
    mask = schedule.reselect(weight, weight != 0, gradient, 1, 2, 4)
    # The second group's dropped weights have no gradient: it stays.
    assert mask.int().tolist() == [[1, 0, 0, 1, 1, 1, 0, 0]]
    model = pruned()
    masked = Masked(model, schedule=RigL(every=2, freeze_at=6, fraction=0.5))
    optimizer = masked.attach(adamw(model))
    first = masked.masks
    train(model, optimizer, 8, masked=masked, clip=1.0)
    changed = sum(int((first[n] != m).sum()) for n, m in masked.masks.items())
    assert changed > 0 and masked.check() == 0
    assert all(int(m.reshape(-1, 4).sum(1).max()) == 2 for m in masked.masks.values())


def test_ema_under_moving_masks_is_made_sparse_by_apply_to():
    model = network()
    masked = Masked(model, masks_of(model), schedule=SRSTE(weight_decay=0.0))
    optimizer = masked.attach(adamw(model, lr=5e-2))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for step in range(8):
        train(model, optimizer, 1, first=step)
        average.update_parameters(model)
    outside = average.module.up.weight[~masked.masks["up"]]
    assert outside.any()
    masked.apply_to(average)
    assert not average.module.up.weight[~masked.masks["up"]].any()


def test_apply_to_another_model_changes_nothing():
    masked = Masked(pruned())
    for down, text in ((nn.Identity(), "a layer named down, got none"), (nn.Linear(4, 4), "of sh")):
        other = network(1)
        other.down = down
        before = other.up.weight.clone()
        with pytest.raises(ValueError, match=f"{text}.* Pass a copy of the model"):
            masked.apply_to(other)
        assert torch.equal(other.up.weight, before)


def test_keep_dense_restores_what_was_dropped():
    model = network()
    dense = model.up.weight.detach().clone()
    masked = Masked(model, masks_of(model), keep_dense=True)
    dropped = ~masked.masks["up"]
    assert not model.up.weight[dropped].any()
    optimizer = masked.attach(adamw(model))
    train(model, optimizer, 3)
    trained = model.up.weight.detach().clone()
    masked.restore()
    assert torch.equal(model.up.weight[dropped], dense[dropped])
    assert torch.equal(model.up.weight[~dropped], trained[~dropped])
    train(model, optimizer, 1)
    assert model.up.weight[dropped].any()  # off means off
    masked.enable()
    assert masked.check() == 0
    train(model, optimizer, 2)
    assert masked.check() == 0
    plain = Masked(pruned())
    with pytest.raises(ValueError, match="keep_dense=True"):
        plain.restore()


def test_many_models_and_optimizers_in_one_process():
    models = [pruned(seed) for seed in range(3)]
    both = [Masked(model) for model in models]
    optimizers = [masked.attach(adamw(model)) for masked, model in zip(both, models)]
    for model, optimizer in zip(models, optimizers):
        train(model, optimizer, 2)
    assert [masked.check() for masked in both] == [0, 0, 0]
    split = pruned()
    masked = Masked(split)
    first = masked.attach(torch.optim.AdamW(split.up.parameters(), 1e-2))
    second = masked.attach(torch.optim.SGD(split.down.parameters(), 0.1))
    for step in range(3):
        x, y = batch(step)
        nn.functional.mse_loss(split(x), y).backward()
        first.step()
        second.step()
    assert masked.check() == 0 and masked.step == 3


def test_the_model_is_held_weakly_and_unchanged():
    model = pruned()
    names = list(model.state_dict())
    masked = Masked(model)
    assert list(model.state_dict()) == names
    assert list(copy.deepcopy(model).state_dict()) == names
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="deleted"):
        _ = masked.model


def test_compress_gives_sparse_linear_with_the_same_output():
    model = pruned().eval()
    masked = Masked(model)
    train(model, masked.attach(adamw(model)), 3)
    x, _ = batch(0)
    want = model(x)
    assert masked.compress() == {}
    assert isinstance(model.up, sk.SparseLinear) and isinstance(model.down, sk.SparseLinear)
    torch.testing.assert_close(model(x), want)


def test_compress_refuses_violations():
    model = pruned()
    masked = Masked(model)
    train(model, adamw(model), 1)
    with pytest.raises(ValueError, match="violations"):
        masked.compress()


def test_from_report_of_prune_model_and_conv1d():
    from python_tests.oneshot.driver_models import build, run_prune

    for family in ("llama", "gpt2"):
        model = build(family)
        report = run_prune(model, "magnitude", compress=False)
        masked = Masked.from_report(model, report)
        assert len(masked) == len(report.pruned)
        optimizer = masked.attach(torch.optim.AdamW(model.parameters(), 1e-3))
        ids = torch.randint(3, 64, (2, 16))
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert masked.check() == 0
        with torch.no_grad():
            want = model(input_ids=ids).logits
            assert masked.compress() == {}
            torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)
    compressed = build("llama")
    report = run_prune(compressed, "magnitude")
    with pytest.raises(ValueError, match="compress=False"):
        Masked.from_report(compressed, report)


def test_masks_from_zeros_and_state_bits():
    weight = torch.tensor([[1.0, 0, 0, 2.0, 0, 0, 0, 0, 0, 5.0, 0, 0]])
    expected = [[1, 0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 1]]
    assert zeros_mask(weight).int().tolist() == expected
    with pytest.raises(ValueError, match="3 \\(1 of 1 groups"):
        zeros_mask(torch.tensor([[1.0, 2.0, 3.0, 0.0]]))
    for shape in ((3, 12), (1, 4), (5, 28)):
        mask = torch.rand(shape) > 0.5
        packed = pack_bits(mask)
        assert packed.numel() == -(-mask.numel() // 8)
        assert torch.equal(unpack_bits(packed, shape), mask)
    for schedule in (Frozen(), SRSTE(3, 9, 0.5, 2), Magnitude(), RigL(5, freeze_at=5)):
        assert make(schedule.describe()) == schedule


def test_errors_name_the_argument():
    model = network()
    masks = masks_of(model)
    with pytest.raises(ValueError, match="2:4 sparse Linear layers, got none"):
        Masked(model)
    with pytest.raises(ValueError, match="mask 'nothing'"):
        Masked(model, {"nothing": masks["up"]})
    with pytest.raises(TypeError, match="of bool"):
        Masked(model, {"up": masks["up"].float()})
    with pytest.raises(ValueError, match="of shape"):
        Masked(model, {"up": masks["up"].t()})
    with pytest.raises(ValueError, match="at most 2 kept"):
        Masked(model, {"up": torch.ones_like(masks["up"])})
    with pytest.raises(ValueError, match="freeze_at, a step, with RigL"):
        RigL(freeze_at=None)
    with pytest.raises(ValueError, match=r"freeze_at >= every \(100\), got 50. Pass every=50"):
        Magnitude(freeze_at=50)
    with pytest.raises(ValueError, match="a schedule that moves masks with every, got every=5"):
        Frozen(every=5)
    with pytest.raises(ValueError, match="weight_decay > 0 with ramp, got ramp=5"):
        Magnitude(ramp=5)
    with pytest.raises(ValueError, match="trains dropped weights with dense_device"):
        Masked(model, masks, schedule=RigL(every=1), dense_device="cpu")
    masked = Masked(model, masks)
    with pytest.raises(ValueError, match="over the masked weights"):
        masked.attach(adamw(network()))
    optimizer = masked.attach(adamw(model))
    with pytest.raises(ValueError, match="not attached yet"):
        masked.attach(optimizer)
    state = masked.state_dict()
    with pytest.raises(FormatError, match="version 1, got 2"):
        masked.load_state_dict({**state, "version": 2})
    with pytest.raises(FormatError, match="1 missing"):
        masked.load_state_dict({**state, "masks": {"up": state["masks"]["up"]}})
    tied = network()
    tied.twin = nn.Linear(16, 32, bias=False)
    tied.twin.weight = tied.up.weight
    with pytest.raises(ValueError, match="tied to"):
        Masked(tied, {"up": masks["up"]})


def test_two_thousand_steps_without_a_violation():
    """AdamW, weight decay, clipping, bf16 autocast, compile: no violation in 80 looks."""
    model = pruned()
    masked = Masked(model)
    optimizer = masked.attach(adamw(model, lr=1e-3, weight_decay=0.1))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    violations = 0
    for step in range(2000):
        x, y = batch(step % 50, samples=4)
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.mse_loss(compiled(x).float(), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        violations += masked.check() if step % 25 == 24 else 0
    assert violations == 0 and masked.step == 2000


def test_weights_that_come_to_the_optimizer_later_are_masked():
    model = pruned()
    masked = Masked(model)
    optimizer = masked.attach(torch.optim.SGD([model.up.weight], 0.1))
    optimizer.add_param_group({"params": [model.down.weight]})
    train(model, optimizer, 2)
    assert masked.check() == 0


def test_an_optimizer_of_weights_that_were_replaced_is_refused():
    model = pruned()
    masked = Masked(model)
    optimizer = masked.attach(adamw(model))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    with pytest.raises(ValueError, match="none of them in it. Make the optimizer .*assign=True"):
        train(model, optimizer, 1)


@pytest.mark.parametrize(
    "copy_of", [copy.copy, copy.deepcopy, lambda m: torch.save(m, io.BytesIO())]
)
def test_copies_and_pickles_are_refused(copy_of):
    """One would belong to the first model still."""
    with pytest.raises(
        TypeError, match=r"copy or pickle.*Masked\(copy_of_the_model, masked.masks\)"
    ):
        copy_of(Masked(pruned()))


def test_what_enable_and_load_state_dict_refuse_changes_nothing():
    model = pruned()
    masked = Masked(model, schedule=SRSTE(freeze_at=9))
    before, state, step = masked.masks, masked.state_dict(), masked.step
    dense = {"up": torch.ones(32, 16, dtype=torch.bool)}
    with pytest.raises(ValueError, match="at most 2 kept"):
        masked.enable({"down": ~masked.masks["down"], **dense})
    with pytest.raises(TypeError, match="of bool, got array"):
        masked.enable({"up": before["up"].numpy()})
    with pytest.raises(ValueError, match="named 'upp', got none. Names are such as 'up'"):
        masked.enable({"upp": before["up"]})
    for wrong, part in (
        ({"masks": {**state["masks"], "up": pack_bits(dense["up"])}}, "2:4 mask 'up', got 4"),
        ({"residue": {"up": torch.ones(3)}}, "residue 'up' of shape"),
        ({"shapes": {}}, "shapes of 2 weights"),
        ({"masks": {**state["masks"], "up": [255]}}, r"mask 'up' of uint8, got \[255\]"),
        ({"masks": {n: m.float() for n, m in state["masks"].items()}}, "of uint8, got a tensor"),
        ({"residue": {"up": 5}}, "residue 'up' of shape .* got 5"),
        ({"residue": None}, "'residue', of type dict, got None"),
        ({"step": "x"}, "'step', of type int, got 'x'"),
        ({"step": -5}, "step >= 0, got -5"),
        ({"enabled": "no"}, "'enabled', of type bool, got 'no'"),
        ({"schedule": "SRSTE"}, "'schedule', of type dict, got 'SRSTE'"),
    ):
        with pytest.raises(FormatError, match=part):
            masked.load_state_dict({**state, "step": 7, **wrong})
    for key in state:
        with pytest.raises(FormatError):
            masked.load_state_dict({k: v for k, v in state.items() if k != key})
    with pytest.raises(TypeError, match="state: a dict"):
        masked.load_state_dict(None)
    assert masked.step == step
    assert all(torch.equal(before[name], mask) for name, mask in masked.masks.items())
    with torch.device("meta"):
        empty = network()
    with pytest.raises(ValueError, match="up with data, got a meta tensor. Load the weights"):
        Masked(empty)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("schedule", [None, SRSTE(freeze_at=2), RigL(every=1, freeze_at=2)])
def test_experts_in_one_parameter_are_masked_and_compressed(family, schedule):
    """Stored [experts, out, in] by Mixtral, and [experts, in, out] by gpt-oss."""
    models = pytest.importorskip("python_tests.nn.expert_models")
    model = models.build(family, num_hidden_layers=1)
    report = sk.prune_model(model, "magnitude", compress=False, progress=False)
    masked = Masked.from_report(model, report, schedule=schedule)
    if schedule is None:  # the zeros say the same
        masked = Masked(model)
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    parameter = model.get_parameter(stack)
    kept, before = masked.masks[stack], parameter.detach().clone()
    assert kept.dim() == 3 and kept.view(-1, 4).sum(1).eq(2).all()
    optimizer = masked.attach(torch.optim.AdamW(model.parameters(), 1e-2))
    tokens = models.ids()
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        assert masked.check() == 0
    assert not torch.equal(parameter, before)
    assert torch.equal(masked.masks[stack], kept) == (schedule is None)
    rows = parameter.mT if family == "gpt-oss" else parameter
    assert not rows[~masked.masks[stack]].any()
    state = masked.state_dict()
    masked.load_state_dict(state)
    with torch.no_grad():
        wanted = model(tokens).logits
        assert masked.compress() == {}
        torch.testing.assert_close(model(tokens).logits, wanted)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, sk.SparseExperts) and len(experts.layers("gate_up_proj")) == 4
    assert all(isinstance(one, sk.SparseLinear) for one in experts.layers("gate_up_proj"))


def test_a_layer_that_starts_at_zero_is_not_masked():
    """lora_B and the like are 2:4 only until they are trained."""
    model = pruned()
    nn.init.zeros_(model.down.weight)
    assert set(Masked(model).masks) == {"up"}
    nn.init.zeros_(model.up.weight)
    with pytest.raises(ValueError, match="2:4 sparse Linear layers, got none"):
        Masked(model)


def test_some_experts_pruned_and_some_not():
    models = pytest.importorskip("python_tests.nn.expert_models")
    model = models.build("mixtral", num_hidden_layers=1)
    skip = ("lm_head", "*.experts.0.gate_up_proj")
    report = sk.prune_model(model, "magnitude", compress=False, progress=False, skip=skip)
    with pytest.raises(ValueError, match="all 4 experts of .*gate_up_proj pruned, got 3"):
        Masked.from_report(model, report)
    with pytest.warns(UserWarning, match="3 of 4 experts of .*gate_up_proj are 2:4 sparse"):
        masked = Masked(model)
    assert any(name.endswith("experts.down_proj") for name in masked.masks)
    assert not any(name.endswith("gate_up_proj") for name in masked.masks)


def test_compress_leaves_dense_what_would_lose_something():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    sk.prune_model(model, "magnitude", compress=False, progress=False)
    model[0].register_buffer("seen", torch.ones(1))
    model.order = [model[1]]
    assert Masked(model).compress() == {
        "0": "Linear holds more than weight and bias (seen)",
        "1": "Sequential holds it outside of its modules, too",
    }
    assert model.order[0] is model[1] and isinstance(model[2], sk.SparseLinear)


class Scaled(nn.Module):
    """One layer whose weight is read beside the call, and one that is asked for its dtype alone."""

    def __init__(self):
        super().__init__()
        self.read, self.asked = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.asked(x.to(self.asked.weight.dtype))
        return nn.functional.linear(y, self.read.weight.abs(), self.read.bias)


def test_compress_leaves_dense_whose_weight_the_model_reads():
    model, x = nn.Sequential(Scaled(), Scaled()), torch.randn(3, 8)
    sk.prune_model(model, "magnitude", compress=False, progress=False)
    want = model(x)
    with torch.inference_mode():  # the model trains on afterwards
        left = Masked(model).compress()
    assert left == dict.fromkeys(("0.read", "1.read"), "Scaled reads the weight itself")
    assert isinstance(model[1].asked, sk.SparseLinear)
    torch.testing.assert_close(model(x), want)
    model(x.requires_grad_()).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["bloom", "wavlm", "jamba"])
def test_compress_replaces_what_prune_model_does(name):
    transformers = pytest.importorskip("transformers")
    model, other = (architectures.build(transformers, name) for _ in range(2))
    options = {"method": "magnitude", "skip": (), "progress": False}
    report = sk.prune_model(model, compress=False, **options)
    want = architectures.outputs(model, name)
    Masked.from_report(model, report).compress()
    sk.prune_model(other, **options)
    for got, expected in zip(architectures.outputs(model, name), want, strict=True):
        torch.testing.assert_close(got, expected)
    found = [
        [n for n, m in one.named_modules() if isinstance(m, sk.SparseLinear)]
        for one in (model, other)
    ]
    assert found[0] == found[1] != []
