"""Strict loading of pretrained models; saving, loading and exporting model folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

from pipelines.config.parser import load_config
from pipelines.inference import load_pipeline
from tcan.errors import UserError
from tcan.fingerprint import fingerprint
from tcan.model import TCAN
from tcan.pipeline import TCANPipeline
from tcan.variant import Variant
from tcan.weights import (
    PretrainedModels,
    export_model,
    load_model,
    load_part,
    load_pretrained,
    portable_source,
    read_model_info,
    save_model,
)
from tcan.weights.check import describe
from tcan.weights.pretrained import NETWORKS, pretrained_fingerprint
from tests.tcan import original_files as files

PARTS = ("vae", "unet", "controlnet", "motion_adapter", "text_encoder", "scheduler")
UNET = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def loaded(pretrained_folder: Path) -> PretrainedModels:
    return load_pretrained(**dict.fromkeys(PARTS, str(pretrained_folder)))


@pytest.fixture(scope="module")
def trained(loaded: PretrainedModels) -> TCAN:
    """A TCAN whose trained parts all differ from their initialization."""
    torch.manual_seed(1)
    model = TCAN(loaded.unet, loaded.controlnet, loaded.motion_adapter, loaded.empty_prompt)
    for part in model.parts().values():
        for tensor in part.values():
            tensor.add_(torch.randn_like(tensor), alpha=0.01)
    return model


@pytest.fixture
def model_folder(trained: TCAN, loaded: PretrainedModels, tmp_path: Path) -> Path:
    save_model(
        trained, tmp_path / "model", pretrained=loaded.info, stage=2, height=128, width=128, stick_width=2
    )
    return tmp_path / "model"


def test_fingerprint_changes_with_any_bit_but_not_with_the_dtype() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).half()
    before = fingerprint(layer)
    assert len(before) == 16 and int(before, 16) >= 0
    assert fingerprint(layer.float()) == before
    bits = layer[0].weight.data.view(torch.int32)
    bits[1, 2] ^= 1
    assert fingerprint(layer) != before
    bits[1, 2] ^= 1
    layer[1].running_mean[0] += 1  # a buffer
    assert fingerprint(layer) != before


def test_fingerprint_depends_on_names_and_shapes() -> None:
    values = torch.arange(6.0)
    prints = {fingerprint({"a": values}), fingerprint({"b": values}), fingerprint({"a": values.view(2, 3)})}
    assert len(prints) == 3


def test_parent_folder_and_part_folders_load_the_same_weights(
    pretrained_folder: Path, loaded: PretrainedModels
) -> None:
    each = load_pretrained(**{part: str(pretrained_folder / part) for part in PARTS})
    for part, info in loaded.info.items():
        assert each.info[part].get("fingerprint") == info.get("fingerprint")
    stored = load_file(pretrained_folder / "unet" / UNET)
    assert all(torch.equal(stored[name], value) for name, value in loaded.unet.state_dict().items())
    assert loaded.empty_prompt.shape == (1, 4, 64)
    assert not any(p.requires_grad for p in loaded.vae.parameters())


def test_prompt_is_the_empty_prompt(pretrained_folder: Path, loaded: PretrainedModels) -> None:
    """Begin, then end up to the full length of 4: the last two ids of a vocabulary of 3, as in CLIP."""
    encoder = CLIPTextModel.from_pretrained(pretrained_folder / "text_encoder").eval()
    with torch.no_grad():
        expected = encoder(torch.tensor([[1, 2, 2, 2]])).last_hidden_state
    torch.testing.assert_close(loaded.empty_prompt, expected)


def test_fingerprints_do_not_depend_on_the_load_dtype(
    pretrained_folder: Path, loaded: PretrainedModels
) -> None:
    small = load_pretrained(**dict.fromkeys(PARTS, str(pretrained_folder)), dtype=torch.bfloat16)
    assert small.unet.dtype == small.empty_prompt.dtype == torch.bfloat16
    assert small.info == loaded.info


def test_missing_and_unexpected_keys_are_errors(pretrained_folder: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(pretrained_folder / "unet")
    for change, reason in (("remove", "missing keys: conv_in.weight"), ("add", "unexpected keys: stray")):
        folder = tmp_path / change
        unet.save_pretrained(folder)
        weights = load_file(folder / UNET)
        if change == "remove":
            del weights["conv_in.weight"]
        else:
            weights["stray"] = torch.zeros(1)
        save_file(weights, folder / UNET)
        with pytest.raises(UserError, match=reason):
            load_pretrained(**dict.fromkeys(PARTS, str(pretrained_folder)) | {"unet": str(folder)})


@pytest.mark.parametrize("source", ["no/such/folder/here", "/no/such/folder", "nothing"])
def test_missing_sources_are_one_line_errors(pretrained_folder: Path, source: str) -> None:
    with pytest.raises(UserError, match="vae") as error:
        load_pretrained(**dict.fromkeys(PARTS, str(pretrained_folder)) | {"vae": source})
    assert "\n" not in str(error.value)


def test_saved_model_loads_bit_identical(trained: TCAN, loaded: PretrainedModels, model_folder: Path) -> None:
    reloaded = load_model(model_folder, loaded)
    for part, weights in trained.parts().items():
        for name, value in reloaded.parts()[part].items():
            assert torch.equal(value, weights[name]), (part, name)
    info = read_model_info(model_folder)
    assert info["pretrained"] == loaded.info
    assert (info["stage"], info["height"], info["stick_width"], info["lora_rank"]) == (2, 128, 2, 16)
    assert [entry.name for entry in model_folder.parent.iterdir()] == ["model"]


def test_stage1_model_has_the_pretrained_temporal_layers(
    trained: TCAN, loaded: PretrainedModels, tmp_path: Path
) -> None:
    save_model(
        trained, tmp_path / "model", pretrained=loaded.info, stage=1, height=128, width=128, stick_width=2
    )
    assert not (tmp_path / "model" / "motion_adapter").exists()
    reloaded = load_model(tmp_path / "model", loaded)
    adapter = loaded.motion_adapter.state_dict()
    assert all(
        torch.equal(value, adapter[name]) for name, value in reloaded.parts()["motion_adapter"].items()
    )


def test_saving_replaces_an_existing_model_folder(
    trained: TCAN, loaded: PretrainedModels, model_folder: Path
) -> None:
    (model_folder / "old").touch()
    save_model(
        trained,
        model_folder,
        pretrained=loaded.info,
        stage=1,
        height=64,
        width=64,
        stick_width=1,
        mlflow_run_id="r",
    )
    assert read_model_info(model_folder)["mlflow_run_id"] == "r"
    assert not (model_folder / "old").exists() and not (model_folder / "motion_adapter").exists()


@pytest.mark.parametrize(
    "file",
    [
        f"appearance_unet/{UNET}",
        "appa/pytorch_lora_weights.safetensors",
        f"motion_adapter/{UNET}",
        f"temporal_controlnet/{UNET}",
    ],
)
def test_incomplete_model_folder_is_an_error(loaded: PretrainedModels, model_folder: Path, file: str) -> None:
    weights = load_file(model_folder / file)
    name = min(weights)
    save_file({key: value for key, value in weights.items() if key != name}, model_folder / file)
    with pytest.raises(UserError, match="missing keys"):
        load_model(model_folder, loaded)
    save_file(weights | {"stray": torch.zeros(1)}, model_folder / file)
    with pytest.raises(UserError, match="unexpected keys: stray"):
        load_model(model_folder, loaded)
    save_file(weights | {name: torch.zeros(3, 1)}, model_folder / file)
    with pytest.raises(UserError, match="has shape"):
        load_model(model_folder, loaded)
    (model_folder / file).unlink()
    with pytest.raises(UserError, match="is incomplete"):
        load_model(model_folder, loaded)


def test_model_on_other_pretrained_models_is_an_error(
    pretrained_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    unet = UNet2DConditionModel.from_pretrained(pretrained_folder / "unet")
    unet.conv_out.bias.data[0] += 1e-3
    unet.save_pretrained(tmp_path / "unet")
    others = load_pretrained(
        **dict.fromkeys(PARTS, str(pretrained_folder)) | {"unet": str(tmp_path / "unet")}
    )
    with pytest.raises(UserError, match="trained on another unet"):
        load_model(model_folder, others)


def export(model: Path, pretrained_folder: Path, out: Path) -> Path:
    export_model(model, out.with_name("before"), pose=str(pretrained_folder / "pose"))
    return out.with_name("before").rename(out)  # the folder can be moved


def test_exported_model_needs_no_other_files(trained: TCAN, pretrained_folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(pretrained_folder, tmp_path / "pretrained")
    pretrained = load_pretrained(**dict.fromkeys(PARTS, str(copied)))
    save_model(
        trained, tmp_path / "model", pretrained=pretrained.info, stage=2, height=64, width=64, stick_width=2
    )
    pipe = TCANPipeline.from_pretrained(tmp_path / "model", pose=str(copied))
    out = export(tmp_path / "model", copied, tmp_path / "out")
    shutil.rmtree(copied)
    shutil.rmtree(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    reloaded = load_pipeline(out, load_config())  # as `tcan animate --model` does
    assert reloaded.pose_detector.fingerprint == pipe.pose_detector.fingerprint
    assert fingerprint(reloaded.vae) == fingerprint(pipe.vae)
    assert fingerprint(reloaded.tcan) == fingerprint(pipe.tcan)
    assert torch.equal(reloaded.tcan.empty_prompt, pipe.tcan.empty_prompt)
    assert dict(reloaded.scheduler.config) == dict(pipe.scheduler.config)
    assert describe(out).startswith("TCAN of stage 2 at 64 x 64: appearance_unet (")


def test_exported_parts_load_with_plain_diffusers(
    trained: TCAN, model_folder: Path, pretrained_folder: Path, tmp_path: Path
) -> None:
    out = export(model_folder, pretrained_folder, tmp_path / "out")
    unet = UNet2DConditionModel.from_pretrained(out / "pretrained" / "unet")
    unet.load_lora_adapter(out / "appa", prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    motion = UNetMotionModel.from_unet2d(
        UNet2DConditionModel.from_pretrained(out / "pretrained" / "unet"),
        MotionAdapter.from_pretrained(out / "motion_adapter"),
    )
    attention = "up_blocks.3.attentions.1.transformer_blocks.0.attn1.to_v"
    x = torch.randn(2, 16)
    trained_layer = trained.denoiser.get_submodule(attention)
    torch.testing.assert_close(unet.get_submodule(attention)(x), trained_layer(x))
    assert not torch.equal(trained_layer(x), trained_layer.base_layer(x))
    for name, tensor in trained.parts()["motion_adapter"].items():
        assert torch.equal(motion.state_dict()[name], tensor), name


def test_export_errors_leave_no_output(
    trained: TCAN, model_folder: Path, loaded: PretrainedModels, pretrained_folder: Path, tmp_path: Path
) -> None:
    pose = str(pretrained_folder / "pose")
    with pytest.raises(UserError, match="names no pose network"):
        export_model(model_folder, tmp_path / "out")
    with pytest.raises(UserError, match="is the model folder itself"):
        export_model(model_folder, model_folder, pose=pose)
    for existing in (tmp_path / "notes", tmp_path / "notes" / "notes.txt"):
        (tmp_path / "notes").mkdir(exist_ok=True)
        (tmp_path / "notes" / "notes.txt").write_text("notes")
        with pytest.raises(UserError, match="already exists and is not a model folder"):
            export_model(model_folder, existing, pose=pose)
        assert (tmp_path / "notes" / "notes.txt").read_text() == "notes"
    unet = UNet2DConditionModel.from_pretrained(pretrained_folder / "unet")
    unet.conv_out.bias.data[0] += 1e-3
    unet.save_pretrained(tmp_path / "unet")
    info = loaded.info | {"unet": loaded.info["unet"] | {"source": str(tmp_path / "unet")}}
    save_model(trained, tmp_path / "other", pretrained=info, stage=2, height=64, width=64, stick_width=2)
    with pytest.raises(UserError, match="was trained on another unet"):
        export_model(tmp_path / "other", tmp_path / "out", pose=pose)
    with pytest.raises(UserError, match="was trained on another unet"):
        describe(tmp_path / "other")
    (model_folder / "appa" / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(UserError, match="is incomplete"):
        export_model(model_folder, tmp_path / "out", pose=pose)
    with pytest.raises(UserError, match="is incomplete"):
        describe(model_folder)
    assert not (tmp_path / "out").exists()


def test_describe_identifies_folders(pretrained_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(pretrained_folder / "unet")
    size = f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M"
    assert describe(pretrained_folder / "unet") == f"unet ({size}), in diffusers' layout"
    description = describe(pretrained_folder)
    assert (
        all(f"{part} (" in description for part in (*PARTS[:5], "pose")) and f"unet ({size})" in description
    )
    assert "local pretrained models: vae (" in describe(model_folder)
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(UserError, match="contains FluxTransformer2DModel, which TCAN does not use"):
        describe(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no weights"):
        describe(tmp_path / "empty")


def test_incompatible_pretrained_models_are_an_error(pretrained_folder: Path, tmp_path: Path) -> None:
    """Each part loads on its own; combined, they would fail in the first step."""
    config = UNet2DConditionModel.load_config(pretrained_folder / "unet") | {"cross_attention_dim": 32}
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "unet")
    with pytest.raises(
        UserError, match="controlnet: not compatible with the unet: cross_attention_dim is 64"
    ):
        load_pretrained(**dict.fromkeys(PARTS, str(pretrained_folder)) | {"unet": str(tmp_path / "unet")})


def test_missing_model_folder_and_other_schema_version_are_errors(
    loaded: PretrainedModels, model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="not a model folder"):
        load_model(tmp_path / "nothing", loaded)
    info = json.loads((model_folder / "tcan.json").read_text())
    (model_folder / "tcan.json").write_text(json.dumps(info | {"schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99"):
        load_model(model_folder, loaded)


def half_precision(source: Path, folder: Path, variant: str | None = "fp16") -> Path:
    """A copy of a folder of pretrained models whose weights are only in fp16."""
    networks = {**NETWORKS}
    for part in (*PARTS[:5], "scheduler"):
        if part == "scheduler":
            shutil.copytree(source / part, folder / part)
        else:
            network = networks[part].from_pretrained(source / part).half()
            network.save_pretrained(folder / part, variant=variant)
    return folder


@pytest.mark.parametrize("options", [{"safe_serialization": False}, {"max_shard_size": "50KB"}])
def test_loading_other_files_of_a_folder_prints_nothing(
    pretrained_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], options: dict
) -> None:
    unet = UNet2DConditionModel.from_pretrained(pretrained_folder / "unet")
    unet.save_pretrained(tmp_path, **options)
    capfd.readouterr()
    loaded = load_part("unet", str(tmp_path)).state_dict()
    assert capfd.readouterr() == ("", "")
    assert all(torch.equal(loaded[name], value) for name, value in unet.state_dict().items())


def test_folder_with_only_the_fp16_variant_loads(pretrained_folder: Path, tmp_path: Path) -> None:
    folder = half_precision(pretrained_folder, tmp_path / "half")
    assert (folder / "text_encoder" / "model.fp16.safetensors").is_file()
    small = load_pretrained(**dict.fromkeys(PARTS, str(folder)))
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert all(torch.equal(stored[name].float(), value) for name, value in small.unet.state_dict().items())
    UNet2DConditionModel.from_pretrained(pretrained_folder / "unet").save_pretrained(folder / "unet")
    full = load_part("unet", str(folder)).state_dict()
    assert not torch.equal(full["conv_in.weight"], stored["conv_in.weight"].float())
    half = load_part("unet", str(folder), "fp16").state_dict()
    assert torch.equal(half["conv_in.weight"], stored["conv_in.weight"].float())


def test_fingerprint_of_motion_modules_does_not_depend_on_the_storage_type(
    pretrained_folder: Path, tmp_path: Path
) -> None:
    """Position tables are computed; in half precision they are rounded, although the weights are the same."""
    adapter = MotionAdapter.from_pretrained(pretrained_folder / "motion_adapter")
    for name, tensor in adapter.state_dict().items():
        if not name.endswith(".pe"):
            tensor.copy_(tensor.half())
    adapter.save_pretrained(tmp_path / "full")
    adapter.half().save_pretrained(tmp_path / "half")
    prints = [
        pretrained_fingerprint("motion_adapter", load_part("motion_adapter", str(tmp_path / name)))
        for name in ("full", "half")
    ]
    assert prints[0] == prints[1]


def test_lfs_pointers_in_folders_are_named(
    pretrained_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    folder = shutil.copytree(pretrained_folder / "unet", tmp_path / "unet")
    (folder / UNET).write_text(pointer)
    with pytest.raises(UserError, match=f"{UNET}: a Git LFS pointer"):
        load_part("unet", str(folder))
    (model_folder / "appearance_unet" / UNET).write_text(pointer)
    with pytest.raises(UserError, match=f"{UNET}: a Git LFS pointer"):
        describe(model_folder)


def test_source_behind_a_symlink_keeps_its_name(tmp_path: Path) -> None:
    """The Hub's cache: snapshots/REVISION/NAME is a symlink to blobs/HASH, which has no suffix."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    files.write_sparse_safetensors(files.checkpoint(), tmp_path / "blobs" / "0123abcd")
    link = tmp_path / "snapshots" / "model.safetensors"
    link.symlink_to("../blobs/0123abcd")
    source = portable_source(str(link))
    assert source == str(link)
    assert load_part("vae", source).config.latent_channels == 4


VARIANTS = [
    pytest.param(Variant(appa=False), marks=pytest.mark.slow),
    pytest.param(Variant(controlnet="finetune"), marks=pytest.mark.slow),
    pytest.param(Variant(temporal_controlnet=False), marks=pytest.mark.slow),
    Variant(False, "finetune", False),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("stage", [1, 2])
def test_variants_train_save_and_load_exactly_their_parts(
    loaded: PretrainedModels, tmp_path: Path, variant: Variant, stage: int
) -> None:
    torch.manual_seed(0)
    base = (loaded.unet, loaded.controlnet, loaded.motion_adapter, loaded.empty_prompt)
    model = TCAN(*base, variant=variant)
    model.set_stage(stage)
    trained_names = {name for name, p in model.named_parameters() if p.requires_grad}
    spatial_controlnet = {
        name
        for name, _ in model.controlnet.named_parameters(prefix="controlnet")
        if ".motion_modules." not in name
    }
    assert any("lora" in name for name in trained_names) == (stage == 1 and variant.appa)
    assert (spatial_controlnet <= trained_names) == (stage == 1 and variant.controlnet == "finetune")
    temporal = {
        name for name in trained_names if name.startswith("controlnet.") and ".motion_modules." in name
    }
    assert bool(temporal) == (stage == 2 and variant.temporal_controlnet)

    inputs = {
        "noisy": torch.randn(1, 3, 4, 8, 8),
        "timestep": torch.tensor([300]),
        "pose": torch.rand(1, 3, 3, 64, 64),
        "reference_latent": torch.randn(1, 4, 8, 8),
    }
    for parameter in model.parameters():  # APPA and the temporal layers start with zeros
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.train()(**inputs).square().mean().backward()
    assert not [
        name for name, p in model.named_parameters() if (p.grad is not None) != (name in trained_names)
    ]

    folder = tmp_path / "model"
    options = {"pretrained": loaded.info, "height": 64, "width": 64, "stick_width": 2}
    save_model(model, folder, stage=stage, **options)
    assert (folder / "appa").exists() == variant.appa
    assert (folder / "controlnet").exists() == (variant.controlnet == "finetune")
    assert (folder / "temporal_controlnet").exists() == (stage == 2 and variant.temporal_controlnet)
    with torch.no_grad():
        reloaded = load_model(folder, loaded)
        assert reloaded.variant == variant
        found = reloaded.parts()  # collecting the tensors takes as long as a forward pass
        for part, weights in model.parts().items():
            if stage == 2 or part not in ("motion_adapter", "temporal_controlnet"):
                assert all(torch.equal(found[part][name], w) for name, w in weights.items()), part
        torch.testing.assert_close(reloaded(**inputs), model.eval()(**inputs), rtol=0, atol=1e-5)
        assert (reloaded(**inputs) - TCAN(*base)(**inputs)).abs().max() > 1e-4


def test_finetuned_controlnet_loads_strictly_and_with_plain_diffusers(
    loaded: PretrainedModels, tmp_path: Path
) -> None:
    model = TCAN(
        loaded.unet,
        loaded.controlnet,
        loaded.motion_adapter,
        loaded.empty_prompt,
        variant=Variant(controlnet="finetune"),
    )
    options = {"pretrained": loaded.info, "height": 64, "width": 64, "stick_width": 2}
    save_model(model, tmp_path / "model", stage=1, **options)
    plain = ControlNetModel.from_pretrained(tmp_path / "model" / "controlnet")
    assert fingerprint(plain) == fingerprint(loaded.controlnet)
    file = tmp_path / "model" / "controlnet" / UNET
    weights = load_file(file)
    save_file({name: weights[name] for name in list(weights)[1:]}, file)
    with pytest.raises(UserError, match="controlnet"):
        load_model(tmp_path / "model", loaded)
