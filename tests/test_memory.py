"""Live-tensor accounting against sizes by hand, torch's profiler and fake tensors."""

import gc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from mdpd_deploy.train.memory.live import (
    ACTIVATIONS,
    LiveBytes,
    fake_tensors,
    measure_peak,
    part,
    storage_bytes,
    tensors_of,
)

MB = 1_000_000  # bytes of a float32 [500, 500]


def square(**options):
    return torch.ones(500, 500, **options)


@pytest.fixture(params=["real", "fake"])
def tensors(request):
    """Run a test with real tensors and again with fake ones: the counts must be the same."""
    if request.param == "real":
        yield
    else:
        with fake_tensors():
            yield


def test_a_tensor_counts_while_it_lives(tensors):
    with LiveBytes() as live:
        x = square()
        assert live.now == MB
        y = x * 2
        assert live.now == 2 * MB
        del x
        assert live.now == MB
        view = y.t()[10:]
        del y
        assert live.now == MB  # a view keeps its storage alive
        view.add_(1)
        assert live.now == MB  # in place: nothing new
        del view
        assert live.now == 0
        assert live.peak == 2 * MB


def test_counting_goes_on_after_the_block(tensors):
    with LiveBytes() as live:
        x = square()
    del x
    assert live.now == 0


def test_storages_held_by_autograd_alone(tensors):
    w = square(requires_grad=True)
    with LiveBytes() as live:
        live.track(w)
        loss = w.exp().exp().sum()  # each exp keeps its own result
        assert live.now == 3 * MB + 4
        loss.backward()
        assert live.now == 2 * MB + 4  # weight, its gradient and the loss
        # weight, two results, one product; a result is freed before the next product is made
        assert live.peak == 4 * MB + 8


def test_a_custom_walk_frees_block_by_block(tensors):
    """Stored block inputs, then recompute and back-propagate one block at a time."""
    blocks = [square(requires_grad=True) for _ in range(4)]
    x = square()
    with LiveBytes() as live:
        live.track(blocks, x)
        taps = [x]
        with torch.no_grad():
            for w in blocks:
                taps.append((taps[-1] * w).exp_())
        assert live.now == 9 * MB
        gradient = torch.ones_like(taps.pop())
        for w in reversed(blocks):
            entry = taps.pop().detach().requires_grad_()
            out = (entry * w).exp()
            gradient, w_gradient = torch.autograd.grad(out, [entry, w], gradient)
            w.grad = w_gradient
            del out, entry, w_gradient
        del x, gradient
        assert live.now == 8 * MB  # four weights and their gradients


def test_checkpointing_keeps_inputs_only(tensors):
    def block(x):
        return x.exp().exp().exp()

    def forward(x, recompute):
        for _ in range(4):
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x.sum()

    found = {}
    for recompute in (False, True):
        x = square(requires_grad=True)
        with measure_peak(weights=x) as peak:
            loss = forward(x, recompute)
            loss.backward()
            del loss
        assert peak.start_bytes == MB
        assert peak.end_bytes == 2 * MB
        found[recompute] = peak.peak_bytes
    assert found[False] == 14 * MB + 8  # input, twelve results, one product
    assert found[True] == 8 * MB + 8  # input, three block inputs, three results, one product


def test_shared_storages_count_once_what_is_covered():
    """Views of one big storage, as a memory-mapped weight file gives."""
    file = torch.zeros(1000)
    first, second = file[:100].view(10, 10), file[100:150]
    overlap, every_other = file[120:200], file[500:600:2]
    assert storage_bytes(first) == 400
    assert storage_bytes(first, second) == 600
    assert storage_bytes(first, second, overlap) == 800
    assert storage_bytes(every_other) == 99 * 4
    assert storage_bytes(torch.zeros(1).expand(1000)) == 4
    assert storage_bytes(torch.zeros(0)) == 0


def test_safetensors_weights_count_their_own_bytes(tmp_path):
    model = nn.Linear(64, 32)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    model.load_state_dict(load_file(tmp_path / "w.safetensors"), assign=True)
    assert storage_bytes(model) == (64 * 32 + 32) * 4


def test_a_view_of_an_untracked_storage_is_not_counted(tensors):
    file = square()
    with LiveBytes() as live:
        view = file[3:]
        file.mul_(2)
        assert live.now == 0
        copy = view.clone()
        assert live.now == copy.untyped_storage().nbytes()


def test_resized_storages():
    with LiveBytes() as live:
        x = torch.empty(10)
        x.resize_(100)
        assert live.now == 400
        del x
        assert live.now == 0


def test_tensors_of_takes_models_optimizers_and_batches():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(5, 3)).sum().backward()
    optimizer.step()
    parameters = 3 * 4 + 4 + 4 + 4
    buffers = 4 * 4 + 4 * 4 + 8
    assert storage_bytes(model) == 2 * parameters * 4 + buffers  # with gradients
    assert storage_bytes(optimizer) == 2 * parameters * 4 + 4 * 4  # two moments and four counts
    batch = {"pixels": torch.zeros(2, 3), "names": ["a", "b"], "label": (torch.zeros(2), None, 3)}
    assert [tuple(t.shape) for t in tensors_of(batch)] == [(2, 3), (2,)]


def test_parts_sum_to_the_peak(tensors):
    w = square(requires_grad=True)
    with measure_peak(weights=w) as peak:
        with part("taps"):
            taps = [square(), square()]
        y = taps[0] * w
        del y
    assert peak.parts == {"weights": MB, "taps": 2 * MB, ACTIVATIONS: MB}
    assert sum(peak.parts.values()) == peak.peak_bytes


def test_fake_tensors_count_on_the_device_they_stand_for():
    with fake_tensors(), measure_peak(device_type="cpu") as peak:
        x = square()
    assert peak.peak_bytes == MB and x.device.type == "cpu"


def test_other_devices_can_be_left_out():
    with measure_peak(device_type="cpu", weights=square(device="meta")) as peak:
        x = square(device="meta")
        assert (x + 1).device.type == "meta"
        y = square()
    assert peak.parts == {ACTIVATIONS: MB}
    assert y.shape == (500, 500)


def tiny_network():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.1, batch_first=True, norm_first=True)
    return nn.Sequential(nn.Conv1d(3, 48, 1), Swap(), *(clone(layer) for _ in range(3)), Mean())


def clone(layer):
    fresh = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.1, batch_first=True, norm_first=True)
    fresh.load_state_dict(layer.state_dict())
    return fresh


class Swap(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2).contiguous()


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def run_step(model, optimizer, batch):
    loss = model(batch["x"]).pow(2).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def second_step_peak():
    model = tiny_network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = {"x": torch.rand(32, 3, 64)}
    run_step(model, optimizer, batch)
    with measure_peak(weights=model, optimizer_state=optimizer, batch=batch) as peak:
        run_step(model, optimizer, batch)
    return peak


def test_fake_step_needs_what_the_real_step_needs():
    real = second_step_peak()
    with fake_tensors():
        fake = second_step_peak()
    assert fake.parts.keys() == real.parts.keys()
    assert fake.start_bytes == real.start_bytes
    assert fake.peak_bytes == pytest.approx(real.peak_bytes, rel=0.02)
    parameters = sum(p.numel() for p in tiny_network().parameters()) * 4
    assert real.parts["weights"] == parameters
    assert real.parts["optimizer_state"] == pytest.approx(2 * parameters, rel=0.01)
    assert real.end_bytes == real.start_bytes  # gradients were dropped


def test_tracker_agrees_with_the_profiler():
    model = tiny_network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = {"x": torch.rand(32, 3, 64)}
    run_step(model, optimizer, batch)
    with measure_peak(weights=model, optimizer_state=optimizer, batch=batch) as peak:
        run_step(model, optimizer, batch)
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        run_step(model, optimizer, batch)
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    now = highest = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]  # not in torch's stub
            highest = max(highest, now)
    assert highest > 0
    assert peak.peak_bytes == pytest.approx(peak.start_bytes + highest, rel=0.02)


def test_tracking_changes_no_number():
    results = []
    for tracked in (False, True):
        model = tiny_network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(1)
        batch = {"x": torch.rand(8, 3, 16)}
        for _ in range(2):
            if tracked:
                with measure_peak(weights=model):
                    run_step(model, optimizer, batch)
            else:
                run_step(model, optimizer, batch)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)


def test_private_names_of_torch_still_exist():
    storage = torch.zeros(3).untyped_storage()
    assert isinstance(storage._cdata, int)
    with fake_tensors():
        fake = torch.zeros(10**6, 10**6)  # 4 TB that nobody allocates
        assert fake.untyped_storage().nbytes() == 4 * 10**12


def test_fake_tensors_answer_when_asked_for_a_number():
    state = torch.get_rng_state()
    with fake_tensors():
        x = torch.rand(3)
        assert x.sum().item() == 1.0
        assert not x.isnan().any()
        assert int(torch.tensor([2, 3]).max()) == 1
        total = x + torch.from_numpy(np.ones(3, dtype=np.float32))  # numpy makes real tensors
        assert total.shape == (3,)
        nn.init.trunc_normal_(x)
    assert torch.equal(torch.get_rng_state(), state)
