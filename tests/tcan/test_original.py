"""Single-file checkpoints: each loads by names and shapes alone, or is rejected with a one-line error."""

import collections
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from tcan.errors import UserError
from tcan.pose import OpenPose
from tcan.pose.hands import FaceDetector, HandDetector
from tcan.pose.openpose_loading import open_pose_module
from tcan.weights import load_part, load_pretrained
from tcan.weights.check import describe
from tests.tcan import original_files as files

PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
# Some original keys and their diffusers keys.
PAIRS = {
    "unet": {
        "time_embed.2.bias": "time_embedding.linear_2.bias",
        "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
        "input_blocks.4.0.skip_connection.weight": "down_blocks.1.resnets.0.conv_shortcut.weight",
        "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight": (
            "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight"
        ),
        "middle_block.2.emb_layers.1.weight": "mid_block.resnets.1.time_emb_proj.weight",
        "output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
        "output_blocks.5.2.conv.bias": "up_blocks.1.upsamplers.0.conv.bias",
        "output_blocks.11.1.proj_out.weight": "up_blocks.3.attentions.2.proj_out.weight",
        "out.2.weight": "conv_out.weight",
    },
    "vae": {
        "encoder.down.1.block.0.nin_shortcut.weight": "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
        "encoder.mid.attn_1.q.weight": "encoder.mid_block.attentions.0.to_q.weight",
        "decoder.mid.attn_1.proj_out.weight": "decoder.mid_block.attentions.0.to_out.0.weight",
        "decoder.up.3.block.2.conv1.bias": "decoder.up_blocks.0.resnets.2.conv1.bias",
        "decoder.norm_out.weight": "decoder.conv_norm_out.weight",
        "post_quant_conv.bias": "post_quant_conv.bias",
    },
    "text_encoder": {
        "text_model.encoder.layers.7.mlp.fc1.weight": "encoder.layers.7.mlp.fc1.weight",
        "text_model.final_layer_norm.bias": "final_layer_norm.bias",
    },
    "controlnet": {
        "zero_convs.11.0.weight": "controlnet_down_blocks.11.weight",
        "middle_block_out.0.bias": "controlnet_mid_block.bias",
        "input_hint_block.0.weight": "controlnet_cond_embedding.conv_in.weight",
        "input_hint_block.10.weight": "controlnet_cond_embedding.blocks.4.weight",
        "input_hint_block.14.bias": "controlnet_cond_embedding.conv_out.bias",
        "input_blocks.10.0.in_layers.2.weight": "down_blocks.3.resnets.0.conv1.weight",
    },
    "motion_adapter": {
        "down_blocks.1.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.1.to_q.weight": (
            "down_blocks.1.motion_modules.0.transformer_blocks.0.attn2.to_q.weight"
        ),
        "up_blocks.3.motion_modules.2.temporal_transformer.transformer_blocks.0.ff_norm.bias": (
            "up_blocks.3.motion_modules.2.transformer_blocks.0.norm3.bias"
        ),
        "up_blocks.0.motion_modules.0.temporal_transformer.proj_out.weight": (
            "up_blocks.0.motion_modules.0.proj_out.weight"
        ),
    },
}


def save(weights: dict[str, Tensor], path: Path, **extra: object) -> Path:
    torch.save({"state_dict": weights, **extra} if extra else weights, path)
    return path


def check_values(part: str, weights: dict[str, Tensor], module: torch.nn.Module, prefix: str = "") -> None:
    """Every tensor of the file is in the network exactly once, and those in `PAIRS` under the expected name."""
    state = {name: t for name, t in module.state_dict().items() if not name.endswith("pos_embed.pe")}
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert collections.Counter(files.values(state)) == collections.Counter(files.values(weights))
    for original, name in PAIRS[part].items():
        if part == "text_encoder" and hasattr(module, "text_model"):
            name = f"text_model.{name}"
        assert (state[name] == weights[prefix + original].flatten()[0]).all(), original


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """An SD1.5 .ckpt file and its weights."""
    weights = files.tensors(files.checkpoint())
    return save(weights, tmp_path_factory.mktemp("sd") / "sd15.ckpt", global_step=840000), weights


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_stable_diffusion_checkpoint_loads_every_tensor(
    checkpoint: tuple[Path, dict[str, Tensor]], part: str
) -> None:
    path, weights = checkpoint
    selected = {name: tensor for name, tensor in weights.items() if name.startswith(PREFIX[part])}
    selected = {name: tensor for name, tensor in selected.items() if not name.endswith("position_ids")}
    check_values(part, selected, load_part(part, str(path)), PREFIX[part])


def test_stable_diffusion_safetensors_loads(tmp_path: Path) -> None:
    path = tmp_path / "sd15.safetensors"
    files.write_sparse_safetensors(files.checkpoint(), path)
    vae = load_part("vae", str(path))
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863 and vae.dtype == torch.float32


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_openpose_controlnet_loads_every_tensor(tmp_path: Path, prefix: str) -> None:
    weights = {prefix + name: tensor for name, tensor in files.tensors(files.controlnet()).items()}
    path = save(weights, tmp_path / "control_v11p_sd15_openpose.pth")
    check_values("controlnet", weights, load_part("controlnet", str(path)), prefix)


def test_vae_in_original_layout_loads_every_tensor(tmp_path: Path) -> None:
    weights = files.tensors(files.vae())
    more = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    path = save(weights | more, tmp_path / "vae-ft-mse-840000-ema-pruned.ckpt")
    check_values("vae", weights, load_part("vae", str(path)))


def test_vae_with_old_diffusers_attention_names_loads(tmp_path: Path) -> None:
    """sd-vae-ft-mse on the Hub uses the attention names of early diffusers versions."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    vae.save_pretrained(tmp_path, safe_serialization=False)
    weights = vae.state_dict()
    renamed = {}
    for name, tensor in weights.items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        renamed[name] = tensor
    assert renamed.keys() != weights.keys()
    torch.save(renamed, tmp_path / "diffusion_pytorch_model.bin")
    loaded = load_part("vae", str(tmp_path)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("middle", [True, False])
def test_motion_modules_load_without_the_middle_block(tmp_path: Path, middle: bool) -> None:
    weights = files.tensors(files.motion_modules(middle))
    adapter = load_part("motion_adapter", str(save(weights, tmp_path / "mm_sd_v15_v2.ckpt")))
    assert adapter.mid_block is None and adapter.config.use_motion_mid_block is False
    used = {name: t for name, t in weights.items() if "mid_block" not in name and not name.endswith(".pe")}
    check_values("motion_adapter", used, adapter)
    table = adapter.state_dict()["up_blocks.2.motion_modules.1.transformer_blocks.0.pos_embed.pe"]
    torch.testing.assert_close(table, files.positions(32, 640))


@pytest.mark.parametrize("frames", [24, 64, None])
def test_motion_modules_load_with_their_number_of_positions(tmp_path: Path, frames: int | None) -> None:
    """24: mm_sd_v14; 64: long-range modules; without tables: AnimateLCM, trained with 64."""
    weights = files.tensors(files.motion_modules(middle=False))
    for name in [name for name in weights if name.endswith(".pe")]:
        width = weights.pop(name).shape[-1]
        if frames:
            weights[name] = files.positions(frames, width)
    path = save({f"module.{name}": tensor for name, tensor in weights.items()}, tmp_path / "mm.ckpt")
    adapter = load_part("motion_adapter", str(path))
    assert adapter.config.motion_max_seq_length == (frames or 64)
    table = adapter.state_dict()["up_blocks.2.motion_modules.1.transformer_blocks.0.pos_embed.pe"]
    torch.testing.assert_close(table, files.positions(frames or 64, 640))
    assert (
        f"AnimateDiff motion modules (417.1 M, up to {frames or 64} frames)" in describe(path) or not frames
    )


def test_motion_modules_with_other_positions_are_an_error(tmp_path: Path) -> None:
    weights = files.tensors(files.motion_modules(middle=False))
    tables = [name for name in weights if name.endswith(".pe")]
    for changed, reason in (
        ({name: weights[name].flip(1) for name in tables}, "sinusoidal"),
        ({tables[0]: weights[tables[0]][:, :24]}, "24 positions, but another table has 32"),
    ):
        path = save(weights | changed, tmp_path / "mm_sd_v15.ckpt")
        with pytest.raises(UserError, match=reason):
            load_part("motion_adapter", str(path))
        with pytest.raises(UserError, match=reason):
            describe(path)


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_unet_alone_loads_every_tensor(tmp_path: Path, wrapper: str) -> None:
    weights = files.tensors(files.unet())
    path = save({wrapper + name: tensor for name, tensor in weights.items()}, tmp_path / "unet.ckpt")
    unet = load_part("unet", str(path))
    check_values("unet", weights, unet)
    save(unet.state_dict(), tmp_path / "diffusers.bin")  # diffusers' keys
    again = load_part("unet", str(tmp_path / "diffusers.bin")).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in unet.state_dict().items())


def test_merges_with_other_text_encoder_keys_load(
    checkpoint: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Renamed keys still give the text encoder; unusable ones do not prevent loading the UNet."""
    start, text = PREFIX["text_encoder"], "cond_stage_model.transformer.text_model."
    extra = {"cond_stage_model.logit_scale": (), "embedding_manager.embedder.x": (3,), "logit_scale": ()}
    extra |= {"cond_stage_model.transformer.text_projection.weight": (3, 3), "denoiser.sigmas": (9,)}
    extra |= {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 768)}
    unused = files.tensors(extra)
    others = {name: tensor for name, tensor in checkpoint[1].items() if not name.startswith(start)}
    renamed = {
        name.replace(text, start): tensor for name, tensor in checkpoint[1].items() if name.startswith(start)
    }
    path = save(others | renamed | unused, tmp_path / "renamed.ckpt")
    assert load_part("unet", str(path)).config.cross_attention_dim == 768
    state = load_part("text_encoder", str(path)).state_dict()
    key = next(name for name in state if name.endswith("layers.7.mlp.fc1.weight"))
    original = checkpoint[1][f"{text}encoder.layers.7.mlp.fc1.weight"]
    assert (state[key] == original.flatten()[0]).all()
    del renamed[f"{start}encoder.layers.7.mlp.fc1.weight"]
    path = save(others | renamed | unused, tmp_path / "broken.ckpt")
    assert load_part("vae", str(path)).config.latent_channels == 4
    assert "the text encoder is not usable: text_encoder from" in describe(path)
    with pytest.raises(UserError, match=r"missing keys: .*layers\.7\.mlp\.fc1\.weight"):
        load_part("text_encoder", str(path))


@pytest.mark.parametrize("name", ["vae.ckpt", "vae.safetensors", "0f3a9c"])
@pytest.mark.parametrize("format_", ["safetensors", "pickle"])
def test_format_is_recognized_by_the_content(tmp_path: Path, format_: str, name: str) -> None:
    """Files are renamed, and blobs of the Hub's cache have no suffix."""
    path = tmp_path / name
    if format_ == "pickle":
        save(files.tensors(files.vae()), path)
    else:
        files.write_sparse_safetensors(files.vae(), path)
    assert sum(p.numel() for p in load_part("vae", str(path)).parameters()) == 83_653_863
    assert describe(path).startswith("SD1.5 VAE (83.7 M)")


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_lfs_pointers_html_pages_and_json_messages_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    for text, reason in (
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
        ("\n<!DOCTYPE html><html></html>", "an HTML page"),
        ('{"error": "Repository not found"}', "a JSON text"),
    ):
        path.write_text(text)
        for load in (
            lambda: load_part("vae", str(path)),
            lambda: describe(path),
            lambda: OpenPose.from_pretrained(path),
        ):
            with pytest.raises(UserError, match=f"model.{suffix}: {reason}"):
                load()


def test_loading_a_file_prints_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    """diffusers warns about modules kept in float32."""
    path = save(files.tensors(files.motion_modules()), tmp_path / "mm.ckpt")
    load_part("motion_adapter", str(path))
    assert not caplog.text and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "module", "network", "text"),
    [
        ("body_pose_model.pth", "model", "bodypose_model", "OpenPose body network (52.3 M)"),
        ("hand_pose_model.pth", "model", "handpose_model", "OpenPose hand network (36.8 M)"),
        ("facenet.pth", "face", "FaceNet", "OpenPose face network (38.4 M)"),
    ],
)
def test_openpose_networks_load_strictly_in_all_forms(
    tmp_path: Path, name: str, module: str, network: str, text: str
) -> None:
    """Of OpenPose's file, with the prefix of `DataParallel` in the dictionary of a trainer, and as safetensors."""
    build = getattr(open_pose_module(module), network)
    in_blocks = network != "FaceNet"
    state = {key.split(".", 1)[1] if in_blocks else key: value for key, value in build().state_dict().items()}
    weights = files.tensors({key: tuple(value.shape) for key, value in state.items()})
    wrapped = {f"module.{key}": value for key, value in weights.items()}
    converted = name.replace(".pth", ".safetensors")
    load = {"bodypose_model": OpenPose, "handpose_model": HandDetector, "FaceNet": FaceDetector}[network]
    for form, (content, file) in enumerate(
        ((weights, name), ({"state_dict": wrapped}, name), (wrapped, converted))
    ):
        folder = tmp_path / str(form)
        folder.mkdir()
        if file == converted:
            save_file({key: value.contiguous() for key, value in content.items()}, folder / file)
        else:
            save(content, folder / file)
        assert describe(folder / file) == f"{text}, as a single file"
        loaded = load.from_pretrained(folder).network.state_dict()
        assert list(files.values(loaded)) == list(files.values(weights))
    wrapped.pop("module.conv1_1.bias")
    for source in (load.from_pretrained, describe):
        with pytest.raises(UserError, match=rf"not OpenPose's {name}: 1 keys missing \['conv1_1.bias'\]"):
            source(save(wrapped, tmp_path / "0" / name))


@pytest.mark.parametrize(
    ("part", "prefix", "name"),
    [
        ("unet", "model.diffusion_model.", "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"),
        ("unet", "model.diffusion_model.", "output_blocks.5.2.conv.bias"),
        ("vae", "", "encoder.mid.attn_1.q.weight"),
        ("text_encoder", "cond_stage_model.transformer.", "text_model.encoder.layers.3.mlp.fc2.bias"),
        ("controlnet", "control_model.", "zero_convs.5.0.bias"),
        ("motion_adapter", "", "up_blocks.1.motion_modules.0.temporal_transformer.norm.bias"),
    ],
)
def test_missing_unexpected_and_misshapen_keys_are_errors(
    tmp_path: Path, part: str, prefix: str, name: str
) -> None:
    shapes = files.motion_modules() if part == "motion_adapter" else getattr(files, part)()
    weights = {prefix + name: tensor for name, tensor in files.tensors(shapes).items()}
    name = prefix + name
    incomplete = {key: tensor for key, tensor in weights.items() if key != name}
    longer = weights | {name: torch.zeros(7, *weights[name].shape[1:])}
    stray = {f"{prefix}stray.{i}.weight": torch.zeros(1) for i in range(5)}
    foreign = weights | stray
    inside = name.rpartition(".")[0] + ".stray"
    for changed, reason in (
        (incomplete, "missing keys: "),
        (longer, r"has shape \[7"),
        (foreign, r"unexpected keys: .*stray\.0\.weight, .*stray\.1\.weight, .*stray\.2\.weight and 2 more"),
        (
            weights | {inside: torch.zeros(1)},
            f"unexpected keys: .*{inside.removeprefix(prefix)}|unexpected keys: .*stray",
        ),
    ):
        with pytest.raises(UserError, match=reason) as error:
            load_part(part, str(save(changed, tmp_path / "file.ckpt")))
        assert "\n" not in str(error.value)


def test_file_of_another_part_is_named_in_the_error(tmp_path: Path) -> None:
    path = save(files.tensors(files.vae()), tmp_path / "vae.ckpt")
    with pytest.raises(
        UserError, match=r"unet: .*vae\.ckpt contains SD1.5 VAE; provide a file that contains the SD1.5 UNet"
    ):
        load_part("unet", str(path))


def test_unknown_key_in_a_checkpoint_is_an_error(
    checkpoint: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    path = save(checkpoint[1] | {"conditioner.embedders.1.x": torch.zeros(1)}, tmp_path / "sdxl.ckpt")
    with pytest.raises(UserError, match=r"unexpected keys: conditioner\.embedders\.1\.x"):
        load_part("vae", str(path))


class ModelCheckpoint:
    """Pickled under the module name that old Lightning checkpoints use."""

    __module__ = "pytorch_lightning.callbacks.model_checkpoint"


class Malicious:
    def __reduce__(self) -> tuple:
        return os.system, ("touch malicious",)


def test_lightning_checkpoints_load_and_code_is_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    import types

    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(ModelCheckpoint.__module__)
    module.ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    weights = files.tensors(files.vae())
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        patched.setitem(sys.modules, "pytorch_lightning.callbacks", types.ModuleType("callbacks"))
        patched.setitem(sys.modules, ModelCheckpoint.__module__, module)
        save(weights, Path("lightning.ckpt"), callbacks={ModelCheckpoint: {"best": ModelCheckpoint()}})
    assert load_part("vae", "lightning.ckpt").config.latent_channels == 4
    save(weights, Path("malicious.ckpt"), callbacks=Malicious())
    with pytest.raises(
        UserError, match=r"malicious.ckpt: contains \S*system, which could execute code"
    ) as error:
        load_part("vae", "malicious.ckpt")
    assert "\n" not in str(error.value) and not Path("malicious").exists()


@pytest.mark.parametrize("name", ["text.ckpt", "hi.ckpt", "text.safetensors", "list.pth", "empty.ckpt"])
def test_other_files_are_one_line_errors(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text({"empty.ckpt": "", "hi.ckpt": "hi\n"}.get(name, "not weights"))
    if name == "list.pth":
        torch.save([1, 2], path)
    with pytest.raises(UserError, match=r"not a weights file|could execute code") as error:
        load_part("vae", str(path))
    assert "\n" not in str(error.value)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vae: no such file: models/vae\.safetensors"):
        load_part("vae", "models/vae.safetensors")


def test_files_of_old_pytorch_are_read(tmp_path: Path) -> None:
    """Their format is not zip, so they cannot be memory-mapped."""
    torch.save(files.tensors({"a.weight": (3, 3)}), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="keys missing"):
        OpenPose.from_pretrained(tmp_path / "a.pth")
    with pytest.raises(UserError, match="unknown layout"):
        load_part("vae", str(tmp_path / "a.pth"))


def test_describe_identifies_files(checkpoint: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    network = open_pose_module("model").bodypose_model()
    shapes = {name.split(".", 1)[1]: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for path, text in (
        (checkpoint[0], "SD1.5 UNet (859.5 M), SD1.5 VAE (83.7 M), SD1.5 text encoder (123.1 M)"),
        (save(files.tensors(files.controlnet()), tmp_path / "c.pth"), "SD1.5 ControlNet (361.3 M)"),
        (
            save(files.tensors(files.motion_modules()), tmp_path / "m.ckpt"),
            "AnimateDiff motion modules (417.1 M, up to 32 frames)",
        ),
        (save(files.tensors(shapes), tmp_path / "body_pose_model.pth"), "OpenPose body network (52.3 M)"),
    ):
        assert describe(path) == f"{text}, as a single file"


@pytest.mark.slow
def test_all_sd15_models_load_from_single_files(
    checkpoint: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Without downloads or other files: the architectures are in the package."""
    sd = str(checkpoint[0])
    control = save(files.tensors(files.controlnet()), tmp_path / "control_v11p_sd15_openpose.pth")
    motion = save(files.tensors(files.motion_modules()), tmp_path / "mm_sd_v15_v2.ckpt")
    pretrained = load_pretrained(
        vae=sd, unet=sd, controlnet=str(control), motion_adapter=str(motion), text_encoder=sd, scheduler=sd
    )
    assert pretrained.empty_prompt.shape == (1, 77, 768)
    assert pretrained.scheduler.config.beta_schedule == "scaled_linear"
    assert pretrained.info["unet"]["source"] == sd and len(pretrained.info["unet"]["fingerprint"]) == 16
