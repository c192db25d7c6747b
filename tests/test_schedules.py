"""Eager, deferred and immediate: the same weights as a hand-written loop, and what they work together with."""

import copy
import gc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bllkern
import nets

LR = 0.05


def sgd(params):
    return torch.optim.SGD(params, lr=LR, momentum=0.9)


def batches(steps, kind="mlp"):
    generator = torch.Generator().manual_seed(1)
    shape = (8, 12) if kind == "mlp" else (8, 3, 8, 8)
    for _ in range(steps):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        yield x, torch.randint(0, nets.CLASSES, (8,), generator=generator)


def hand_written(blocks, heads, objective, optimizer, data):
    """Detached blocks, each with a head [C, D] of its own: the loop that the library replaces."""
    for x, y in data:
        optimizer.zero_grad()
        for block, (weight, bias, *hidden) in zip(blocks[:-1], heads, strict=True):
            x = block(x.detach())
            seen = [F.adaptive_avg_pool2d(x, min(4, x.shape[2])).flatten(1) if x.dim() == 4 else x]
            for layer in hidden:
                seen.append(torch.relu(F.batch_norm(F.linear(seen[0], layer), None, None, training=True)))
            loss = F.cross_entropy(seen[-1] @ weight.T + bias, y, label_smoothing=0.1)
            for rows in seen if objective != "bwbpf" else ():
                unit = F.normalize(rows - rows.mean(1, keepdim=True), dim=1)
                loss = loss + 4 * ((unit @ unit.T - (y[:, None] == y).double()) ** 2).mean()
            loss.backward()
        F.cross_entropy(blocks[-1](x.detach()), y).backward()
        optimizer.step()


def blocks_of(model, net):
    cut = {"mlp": [0, 2, 4, 6, 7], "convnet": [0, 1, 2, 4]}[model]
    return [net[start:stop] for start, stop in zip(cut, cut[1:], strict=False)]


def heads_of(converted):
    found = []
    for block in (m for m in converted.modules() if isinstance(m, bllkern.Boundary)):
        local = block.objective
        if local.head is not None:
            found.append((local.head.weight, local.head.bias))
        else:
            found.append((local.feedback.link.weight, local.log_prior))
        if local.reader is not None:
            found[-1] += (local.reader.hidden.weight,)
    return found


def train(net, schedule, data, optimizers):
    for x, y in data:
        optimizers.zero_grad()
        with bllkern.targets(y):
            loss = F.cross_entropy(net(x), y)
        if schedule == "deferred":
            loss = loss + bllkern.local_loss(net)
        loss.backward()
        optimizers.step()


@pytest.mark.parametrize("objective", ["bll", "bwbpf", "predsim"])
@pytest.mark.parametrize("model", ["mlp", "convnet"])
@pytest.mark.parametrize("schedule", ["eager", "deferred", "immediate"])
def test_same_weights_as_a_hand_written_loop(schedule, model, objective):
    net, cuts, x, _ = nets.build(model)
    net = net.double()
    expected = copy.deepcopy(net)
    converted = bllkern.convert(net, cuts, nets.CLASSES, objective, schedule, example=x.double())
    heads = copy.deepcopy(heads_of(converted))
    parameters = [*expected.parameters(), *(p for head in heads for p in head)]
    hand_written(blocks_of(model, expected), heads, objective, sgd(parameters), batches(20, model))
    train(converted, schedule, batches(20, model), bllkern.optimizers(converted, sgd))
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value, rtol=0, atol=1e-10)
    for got, want in zip(heads_of(converted), heads, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_one_optimizer_over_all_parameters_is_the_same():
    results = []
    for together in (True, False):
        torch.manual_seed(3)
        net, cuts, x, _ = nets.build("mlp")
        converted = bllkern.convert(net.double(), cuts, nets.CLASSES, example=x.double())
        train(
            converted,
            "eager",
            batches(5),
            sgd(converted.parameters()) if together else bllkern.optimizers(converted, sgd),
        )
        results.append(net.state_dict())
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key])


@pytest.mark.parametrize("schedule", ["eager", "deferred"])
def test_gradient_accumulation(schedule):
    net, cuts, x, y = nets.build("mlp")
    converted = bllkern.convert(net.double(), cuts, nets.CLASSES, "bwbpf", schedule, example=x.double())
    gradients = []
    for parts in (1, 4):
        converted.zero_grad()
        for xs, ys in zip(x.double().chunk(parts), y.chunk(parts), strict=True):
            with bllkern.targets(ys, scale=1 / parts):
                loss = F.cross_entropy(converted(xs), ys) / parts
            if schedule == "deferred":
                loss = loss + bllkern.local_loss(converted)
            loss.backward()
        gradients.append([p.grad.clone() for p in converted.parameters()])
    for whole, accumulated in zip(*gradients, strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=0, atol=1e-12)


def test_clipping_with_eager():
    net, cuts, x, y = nets.build("mlp")
    converted = bllkern.convert(net, cuts, nets.CLASSES)
    with bllkern.targets(y):
        F.cross_entropy(converted(x), y).backward()
    before = {name: p.grad.clone() for name, p in converted.named_parameters()}
    norm = nn.utils.clip_grad_norm_(converted.parameters(), 1e-3)
    torch.testing.assert_close(norm, torch.stack([g.norm() for g in before.values()]).norm())
    for name, p in converted.named_parameters():
        torch.testing.assert_close(p.grad, before[name] * 1e-3 / norm, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("objective", ["bll", "bwbpf", "predsim"])
def test_bf16_autocast_with_eager(objective):
    net, cuts, x, y = nets.build("convnet")
    converted = bllkern.convert(net, cuts, nets.CLASSES, objective, example=x)
    full = copy.deepcopy(converted)
    with bllkern.targets(y):
        F.cross_entropy(full(x), y).backward()
        with torch.autocast("cpu", torch.bfloat16):
            output = converted(x)
            assert output.dtype == torch.bfloat16
        F.cross_entropy(output.float(), y).backward()
    for name, loss in bllkern.local_losses(converted).items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, bllkern.local_losses(full)[name], rtol=0.02, atol=0)
    for p, q in zip(converted.parameters(), full.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == torch.float32
        assert (p.grad - q.grad).norm() < 0.1 * q.grad.norm() + 1e-3  # the bias before batch norm has none


@pytest.mark.parametrize("schedule", ["eager", "deferred"])
def test_compiled_blocks(schedule):
    net, cuts, x, y = nets.build("convnet")
    plain = bllkern.convert(net, cuts, nets.CLASSES, schedule=schedule, example=x)
    compiled = copy.deepcopy(plain)
    for name in cuts:
        block = compiled.get_submodule(name)
        block.module = torch.compile(block.module, backend="aot_eager", fullgraph=True)
    for one in (plain, compiled):
        train(one, schedule, [(x, y)] * 3, torch.optim.SGD(one.parameters(), lr=LR))
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("model", ["mlp", "resnet", "gpt"])
def test_boundaries_are_the_only_graph_breaks(model):
    net, cuts, x, y = nets.build(model)
    torch._dynamo.reset()
    assert torch._dynamo.explain(net)(x).graph_break_count == 0
    converted = bllkern.convert(net, cuts, nets.CLASSES, example=x)
    torch._dynamo.reset()
    with bllkern.targets(y):
        breaks = torch._dynamo.explain(converted)(x).break_reasons
    assert breaks and all("Boundary.forward" in str(found.reason) for found in breaks)


@pytest.mark.parametrize("schedule", ["eager", "deferred"])
def test_a_whole_network_compiles(schedule):
    net, cuts, x, y = nets.build("mlp")
    plain = bllkern.convert(net, cuts, nets.CLASSES, schedule=schedule, example=x)
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, backend="aot_eager")
    train(plain, schedule, [(x, y)] * 3, torch.optim.SGD(plain.parameters(), lr=LR))
    train(compiled, schedule, [(x, y)] * 3, torch.optim.SGD(other.parameters(), lr=LR))
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def train_scaled(schedule, init_scale, steps):
    """The network after steps in float16, how its loss went, and the scaler."""
    torch.manual_seed(0)
    net, cuts, x, y = nets.build("mlp")
    converted = bllkern.convert(net, cuts, nets.CLASSES, schedule=schedule, example=x)
    optimizers = bllkern.optimizers(converted, sgd)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    losses = []
    for _ in range(steps):
        optimizers.zero_grad()
        with bllkern.targets(y, scaler=scaler), torch.autocast("cpu", torch.float16):
            output = converted(x)
            assert output.dtype == torch.float16
        losses.append(F.cross_entropy(output.float(), y))
        loss = losses[-1] + bllkern.local_loss(converted) if schedule == "deferred" else losses[-1]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizers)
        nn.utils.clip_grad_norm_(optimizers.param_groups[-1]["params"], 1.0)
        scaler.step(optimizers)
        scaler.update()
    return converted, losses, scaler


@pytest.mark.parametrize("schedule", ["eager", "immediate"])
def test_fp16_gradient_scaling(schedule):
    deferred, losses, scaler = train_scaled("deferred", 2.0**10, 30)
    assert losses[-1] < 0.8 * losses[0] and scaler.get_scale() == 2.0**10
    other, _, scaler = train_scaled(schedule, 2.0**10, 30)
    assert scaler.get_scale() == 2.0**10
    for p, q in zip(other.parameters(), deferred.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("schedule", ["eager", "deferred", "immediate"])
def test_fp16_gradients_that_overflow_are_skipped(schedule):
    net, _, scaler = train_scaled(schedule, 2.0**60, 1)
    assert scaler.get_scale() == 2.0**59
    for p, q in zip(net.parameters(), train_scaled(schedule, 1.0, 0)[0].parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_scaler_of_another_kind():
    with pytest.raises(TypeError, match="scaler must be a torch.amp.GradScaler, got float"):
        with bllkern.targets(torch.zeros(2, dtype=torch.int64), scaler=2.0**16):
            pass


def test_immediate_needs_optimizers():
    net, cuts, x, y = nets.build("mlp")
    converted = bllkern.convert(net, cuts, nets.CLASSES, schedule="immediate")
    with pytest.raises(RuntimeError, match=r"block '1' has schedule='immediate' but no optimizer: call `bllkern.opt"):
        with bllkern.targets(y):
            converted(x)
    with pytest.raises(ValueError, match="no block-local boundary"):
        bllkern.optimizers(net, sgd)


def test_immediate_keeps_no_gradients():
    net, cuts, x, y = nets.build("mlp")
    converted = bllkern.convert(net, cuts, nets.CLASSES, schedule="immediate")
    bllkern.optimizers(converted, sgd)
    with bllkern.targets(y):
        converted(x)
    assert all(p.grad is None for p in converted.parameters())


def test_deferred_losses_must_be_used():
    net, cuts, x, y = nets.build("mlp")
    converted = bllkern.convert(net, cuts, nets.CLASSES, schedule="deferred")
    with pytest.raises(RuntimeError, match="no local loss waits"):
        bllkern.local_loss(converted)
    with bllkern.targets(y):
        converted(x)
    with pytest.raises(RuntimeError, match="block '1' from the step before was never used"), bllkern.targets(y):
        converted(x)


def test_optimizers_per_block():
    net, cuts, x, y = nets.build("mlp")
    converted = bllkern.convert(net, cuts, nets.CLASSES, "predsim", example=x)
    optimizers = bllkern.optimizers(converted, sgd)
    owned = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    assert len(optimizers) == len(cuts) + 1
    everything = [id(p) for params in owned for p in params]
    assert sorted(everything) == sorted(id(p) for p in converted.parameters())
    assert {id(p) for p in owned[1]} == {id(p) for p in [*converted[2].parameters(), *converted[3].local.parameters()]}
    train(converted, "eager", [(x, y)] * 2, optimizers)
    again = bllkern.optimizers(copy.deepcopy(converted), sgd)
    again.load_state_dict(optimizers.state_dict())
    for one, other in zip(again, optimizers, strict=True):
        assert str(one.state_dict()) == str(other.state_dict())
    with pytest.raises(ValueError, match="state must hold 4 optimizers, got 1"):
        optimizers.load_state_dict({"optimizers": [{}]})


def test_optimizers_before_the_blocks_are_known():
    net, cuts, x, y = nets.build("mlp")
    converted = bllkern.convert(net, cuts, nets.CLASSES)
    optimizers = bllkern.optimizers(converted, sgd)
    with pytest.raises(RuntimeError, match="pass example= to convert"):
        optimizers.step()
    train(converted, "eager", [(x, y)], optimizers)
    assert len(optimizers) == len(cuts) + 1


def _replica(rank, file, schedule, around, queue):
    """Two processes, half a batch each; puts what they end with into ``queue``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        queue.put((rank, _train_replica(rank, schedule, around)))
    except RuntimeError as error:
        queue.put((rank, str(error)))
    gc.collect()  # a DDP that outlives its group ends it while holding the GIL, which gloo's thread may wait for
    dist.destroy_process_group()


def _train_replica(rank, schedule, around):
    torch.manual_seed(0)
    net, cuts, x, y = nets.build("mlp")
    x = x.double()
    net = bllkern.convert(net.double(), cuts, nets.CLASSES, "bwbpf", schedule, example=x)
    if around == "network":
        wrapped = DistributedDataParallel(net)
    else:
        for i in (0, 2, 4, 6):
            net[i] = DistributedDataParallel(net[i])
        wrapped = net
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for _ in range(3):
        optimizer.zero_grad()
        with bllkern.targets(y.chunk(2)[rank]):
            loss = F.cross_entropy(wrapped(x.chunk(2)[rank]), y.chunk(2)[rank])
        if schedule == "deferred":
            loss = loss + bllkern.local_loss(net)
        loss.backward()
        optimizer.step()
    return [p.detach().numpy() for name, p in net.named_parameters() if "local" not in name]


def _run_replicas(tmp_path, schedule, around):
    context = mp.get_context("spawn")
    queue = context.Queue()
    arguments = (str(tmp_path / "rendezvous"), schedule, around, queue)
    processes = [context.Process(target=_replica, args=(rank, *arguments), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    return results


def test_data_parallel_with_deferred(tmp_path):
    results = _run_replicas(tmp_path, "deferred", "network")
    net, cuts, x, y = nets.build("mlp")
    net = bllkern.convert(net.double(), cuts, nets.CLASSES, "bwbpf", "deferred", example=x.double())
    train(net, "deferred", [(x.double(), y)] * 3, torch.optim.SGD(net.parameters(), lr=LR))
    expected = [p.detach() for name, p in net.named_parameters() if "local" not in name]
    for rank in (0, 1):
        for got, want in zip(results[rank], expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(got), want, rtol=0, atol=1e-12)


def test_data_parallel_around_an_eager_network_is_refused(tmp_path):
    for message in _run_replicas(tmp_path, "eager", "network").values():
        assert "block '1' takes its gradient inside the forward pass" in message and "schedule='deferred'" in message


def test_data_parallel_inside_eager_blocks(tmp_path):
    results = _run_replicas(tmp_path, "eager", "blocks")
    for one, other in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(torch.from_numpy(one), torch.from_numpy(other), rtol=0, atol=0)
