"""Compiled networks: no graph break, one compilation per network, and the results of eager mode.

`fullgraph=True` raises at a graph break. The backends count compilations: "eager" runs torch's operators from the traced
graph, "aot_eager" also from the traced backward graph.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tcan.acceleration import (
    TCAN_NETWORKS,
    compile_for_frames,
    compile_tcan,
    compile_vae,
    is_compiled,
    use_fast_formats,
)
from tcan.model import TCAN, diffusion_loss
from tcan.pose.network import BodyPoseNetwork
from tests.operators import CountOperators
from tests.tiny import LATENT, tiny_batch, tiny_tcan, tiny_vae

TOLERANCE = 1e-5
"""Largest difference relative to the largest value; float32. Fused kernels round differently."""


@pytest.fixture(autouse=True)
def new_caches() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def counters(names: Any, backend: Any) -> dict[str, CompileCounterWithBackend]:
    return {name: CompileCounterWithBackend(backend) for name in names}


def compilations(counted: dict[str, CompileCounterWithBackend]) -> dict[str, int]:
    return {name: counter.frame_count for name, counter in counted.items()}


def difference(a: Any, b: Any) -> float:
    largest = max(float(x.abs().max()) for x in a)
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / largest


def guided_step(tcan: TCAN, timestep: int, seed: int, scale: float = 0.8) -> Tensor:
    """One denoising step of one window of two frames with guidance, a temperature map and cached pose embeddings."""
    batch = tiny_batch(1, 2, seed)
    t = torch.tensor([timestep])
    with torch.no_grad():
        features = tcan.appearance(batch["reference_latent"], t)
        residuals = tcan.pose_residuals(batch["noise"], t, tcan.embed_pose(batch["pose"]), scale)
        temperature = 1 + batch["pose"][0, 0, 0]
        return tcan.denoise(batch["noise"], t, residuals, features, [False, True], temperature, LATENT)


def gradients(
    tcan: TCAN,
    batch: dict[str, Tensor],
    mask: list[bool] | None,
    during: AbstractContextManager | None = None,
) -> list[Tensor]:
    """The loss, then the gradient of every trained parameter.

    during: context of the forward and backward pass.
    """
    tcan.zero_grad()
    scheduler = DDIMScheduler()
    with during or nullcontext():
        loss = diffusion_loss(tcan, scheduler, **batch, reference_mask=mask)
        loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in tcan.parameters() if p.requires_grad)]


@pytest.mark.slow
def test_denoising_is_one_graph_per_network_over_timesteps_windows_and_guidance_rows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tcan = tiny_tcan()
    steps = [(999, 0), (999, 1), (500, 2), (1, 3)]  # (timestep, window)
    expected = [guided_step(tcan, *step) for step in steps]
    with CountOperators() as eager:
        guided_step(tcan, *steps[0])
    counted = counters(TCAN_NETWORKS, "eager")
    outside = CountOperators()
    compile_tcan(tcan, {method: outside.outside(backend) for method, backend in counted.items()})
    assert difference(expected, [guided_step(tcan, *step) for step in steps]) < TOLERANCE
    with outside:
        guided_step(tcan, *steps[0])
    with capsys.disabled():
        print("\n| network | graph breaks | compilations in 4 window steps |\n|---|---|---|")
        for method, number in compilations(counted).items():
            print(f"| {TCAN_NETWORKS[method]} | 0 | {number} |")
        print(
            f"operators launched from Python in a window step: eager {eager.count}, compiled {outside.count}"
        )
    assert 0 < outside.count < eager.count / 10
    assert set(compilations(counted).values()) == {1}


def test_vae_is_one_graph_per_network() -> None:
    vae = tiny_vae().eval()
    images = [torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    with torch.no_grad():
        expected = [vae.decode(vae.encode(image).latent_dist.mean).sample for image in images]
        counted = counters(("encoder", "decoder"), "eager")
        compile_vae(vae, counted)
        found = [vae.decode(vae.encode(image).latent_dist.mean).sample for image in images]
    assert difference(expected, found) < TOLERANCE
    assert compilations(counted) == {"encoder": 1, "decoder": 1}


def test_network_of_frames_is_one_graph_for_all_sizes() -> None:
    network = BodyPoseNetwork().eval().requires_grad_(False)
    images = [torch.rand(*size) for size in ((2, 3, 64, 128), (3, 3, 96, 96), (7, 3, 128, 72))]
    expected = [part for image in images for part in network(image)]
    counter = CompileCounterWithBackend("eager")
    compile_for_frames(network, counter)
    found = [part for image in images for part in network(image)]
    assert difference(expected, found) < TOLERANCE
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "checkpointing"), [(1, True), (2, False)])
def test_gradients_of_compiled_networks(
    stage: int, checkpointing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    tcan = tiny_tcan()
    tcan.set_stage(stage)
    tcan.train()
    if checkpointing:
        tcan.enable_gradient_checkpointing()
    masks = [[False, True], [True, True], [False, False], [True, False]] if stage == 1 else [None, None]
    batches = [tiny_batch(2, 1 if stage == 1 else 2, seed) for seed in range(len(masks))]
    eager, outside = CountOperators(), CountOperators()
    only_last = [None] * (len(masks) - 1)
    expected = [gradients(tcan, *case) for case in zip(batches, masks, [*only_last, eager], strict=True)]
    counted = counters(TCAN_NETWORKS, outside.outside_forward_and_backward())
    compile_tcan(tcan, counted)
    cases = zip(batches, masks, [*only_last, outside], strict=True)
    for case, values in zip(cases, expected, strict=True):
        assert difference(values, gradients(tcan, *case)) < TOLERANCE
    with capsys.disabled():
        print(
            f"\n| stage {stage} | graph breaks | compilations in {len(masks)} micro-batches |\n|---|---|---|"
        )
        for method, number in compilations(counted).items():
            print(f"| {TCAN_NETWORKS[method]} | 0 | {number} |")
        print(
            f"operators launched from Python in a micro-batch: eager {eager.count}, compiled {outside.count}"
        )
    assert set(compilations(counted).values()) == {1}
    assert 0 < outside.count < eager.count / 10


@pytest.mark.slow
def test_inductor_decodes_like_eager_mode() -> None:
    """With the mode of CUDA graphs, which compiles without them on a CPU; their outputs are copies in any case."""
    vae = tiny_vae().eval()
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents).sample
        compile_vae(vae, cuda_graphs=True)
        first, second = (vae.decode(latents).sample for _ in range(2))
    assert difference([expected], [first]) < TOLERANCE and torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


def test_reference_mask_on_the_device_equals_the_mask_on_the_host() -> None:
    tcan = tiny_tcan()
    batch = tiny_batch(3, 2)
    for mask in ([True, False, True], [False, False, False], [True, True, True]):
        with torch.no_grad():
            features = tcan.appearance(batch["reference_latent"], batch["timestep"])
            inputs = batch["noise"], batch["timestep"], None, features
            expected, found = (tcan.denoise(*inputs, value) for value in (mask, torch.tensor(mask)))
        assert difference([expected], [found]) < TOLERANCE


def test_compile_auto_is_on_for_gpus_only() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert is_compiled("auto", gpu) and not is_compiled("auto", cpu)
    assert is_compiled(True, cpu) and not is_compiled(False, gpu)


def test_formats_change_on_gpus_only() -> None:
    before = torch.get_float32_matmul_precision()
    network = torch.nn.Conv2d(8, 8, 3)
    use_fast_formats(torch.device("cpu"), network)
    assert torch.get_float32_matmul_precision() == before
    assert not network.weight.is_contiguous(memory_format=torch.channels_last)
    try:
        use_fast_formats(torch.device("cuda"), network)
        assert torch.get_float32_matmul_precision() == "high"
        assert network.weight.is_contiguous(memory_format=torch.channels_last)
    finally:
        torch.set_float32_matmul_precision(before)
