"""Files of LoRAs and weights: what they add to which weight, and what is refused to the last tensor."""

import hashlib
import json
import math
import struct

import pytest
import safetensors.torch
import torch

from difa_compile.bundle.adapters import METADATA, LowRank, Whole, changes, open_adapter
from difa_compile.bundle.weights import Place
from difa_compile.errors import AdapterError

OUT, IN, RANK = 6, 4, 2
STORED = {
    "transformer.blocks.0.to_q.weight": Place(0, 96, torch.float32, (OUT, IN)),
    "transformer.blocks.0.to_q.bias": Place(0, 24, torch.float32, (OUT,)),
    "transformer.blocks.1.to_q.weight": Place(0, 48, torch.bfloat16, (OUT, IN)),
    "transformer.patch.weight": Place(0, 0, torch.float32, (OUT, 3, 2, 2)),
    "transformer.count.weight": Place(0, 0, torch.int64, (OUT, IN)),
    "vae.blocks.1.to_q.weight": Place(0, 0, torch.float32, (OUT, IN)),
    "transformer_2.blocks.9.to_q.weight": Place(0, 0, torch.float32, (OUT, IN)),
}
QUERY = "transformer.blocks.0.to_q"


def factors(module=QUERY, rank=RANK, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(module))
    return {
        f"{module}.lora_A.weight": torch.randn(rank, IN, generator=generator).to(dtype),
        f"{module}.lora_B.weight": torch.randn(OUT, rank, generator=generator).to(dtype),
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lora.safetensors"


def read(path, tensors, without=(), config=None, components=("transformer",), pipeline="DiTPipeline"):
    metadata = None if config is None else {METADATA: json.dumps(config)}
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    return changes(open_adapter(path), STORED, components, without, pipeline)


def only(path, tensors, **options):
    """The one change that a file makes, and to what."""
    ((name, change),) = read(path, tensors, **options).by_weight.items()
    return name, change


# --- LoRAs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [QUERY, "blocks.0.to_q"])
def test_a_module_with_its_component_or_without(path, module):
    found = read(path, factors(module))
    assert found.kind == "lora"
    assert found.by_weight == {f"{QUERY}.weight": LowRank(f"{module}.lora_A.weight", f"{module}.lora_B.weight", 1.0)}
    weight = torch.randn(OUT, IN)
    up, down = (found.tensors[f"{module}.lora_{factor}.weight"] for factor in "BA")
    made = found.of(f"{QUERY}.weight", weight, 0.5)
    assert torch.allclose(made, weight + 0.5 * up @ down, rtol=0, atol=1e-6)


def test_sums_are_made_in_single_precision_and_rounded_once(path):
    found = read(path, factors("blocks.1.to_q", dtype=torch.bfloat16))
    name = "transformer.blocks.1.to_q.weight"
    weight = torch.randn(OUT, IN, dtype=torch.bfloat16)
    up, down = (found.tensors[f"blocks.1.to_q.lora_{factor}.weight"].double() for factor in "BA")
    made = found.of(name, weight, 1.0)
    assert made.dtype is torch.bfloat16
    assert torch.equal(made, (weight.double() + up @ down).float().bfloat16())


def test_a_convolution(path):
    module = "transformer.patch"
    down, up = torch.randn(RANK, 3, 2, 2), torch.randn(OUT, RANK, 1, 1)
    found = read(path, {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up})
    added = found.of(f"{module}.weight", torch.zeros(OUT, 3, 2, 2), 1.0)
    images = torch.randn(1, 3, 8, 8)
    wanted = torch.conv2d(torch.conv2d(images, down, stride=2), up)
    assert torch.allclose(torch.conv2d(images, added, stride=2), wanted, rtol=0, atol=1e-5)


def test_alpha_over_rank(path):
    given = factors() | {f"{QUERY}.alpha": torch.tensor(1.0)}
    assert only(path, given)[1].factor == 1.0 / RANK
    given |= factors("transformer.blocks.1.to_q")
    assert {each.factor for each in read(path, given).by_weight.values()} == {1.0 / RANK}, "as the only alpha there is"
    given |= factors("transformer_2.blocks.9.to_q") | {"transformer_2.blocks.9.to_q.alpha": torch.tensor([3.0])}
    with pytest.raises(AdapterError, match=r"no alpha for transformer.blocks.1.to_q, and several for others"):
        read(path, given)


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"r": 2, "lora_alpha": 6}, 3.0),
        ({"r": 2, "lora_alpha": 6, "use_rslora": True}, 6 / math.sqrt(2)),
        ({"r": 8, "lora_alpha": 6, "rank_pattern": {"to_q": 2}}, 3.0),
        ({"r": 2, "lora_alpha": 6, "alpha_pattern": {"blocks.0.to_q": 1, "to_q": 5}}, 0.5),
        ({"r": 2, "lora_alpha": 6, "alpha_pattern": {"^to_q": 1}}, 3.0),
        ({"r": 2, "lora_alpha": 6, "alpha_pattern": {"o_q": 1}}, 3.0),
    ],
)
def test_pefts_configuration(path, config, factor):
    assert only(path, factors("blocks.0.to_q"), config=config)[1].factor == factor
    config = {f"transformer.{name}": value for name, value in config.items()} | {"text_encoder.r": 3}
    assert only(path, factors(), config=config)[1].factor == factor


def test_pefts_own_form(path):
    given = factors("base_model.model.blocks.0.to_q")
    with pytest.raises(AdapterError, match=r"stands in adapter_config.json, and there is none"):
        read(path, given)
    path.with_name("adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    name, change = only(path, given)
    assert (name, change.factor) == (f"{QUERY}.weight", 2.0)
    assert open_adapter(path.parent).path == path


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 4, "lora_alpha": 6}, "says rank 4 of blocks.0.to_q, whose factors have 2"),
        ({"r": 2}, "has no lora_alpha"),
        ({"r": 2, "lora_alpha": "x"}, "lora_alpha in the configuration of .* is 'x', no number"),
        ({"r": 2, "lora_alpha": 6, "use_dora": True}, "says use_dora = True, which is more than a LoRA"),
        ({"r": 2, "lora_alpha": 6, "init_lora_weights": "pissa"}, "says init_lora_weights = 'pissa'"),
        ({"r": 2, "lora_alpha": 6, "alpha_pattern": {"(a+)+b": 1}}, "regular expression"),
        ({"r": 2, "lora_alpha": 6, "alpha_pattern": 3}, "alpha_pattern in the configuration .* is no table"),
        ([], "cannot be read: it is no object"),
    ],
)
def test_configurations_that_are_not_carried_out(path, config, message):
    with pytest.raises(AdapterError, match=message):
        read(path, factors("blocks.0.to_q"), config=config)


def test_a_scale_that_is_told_twice(path):
    with pytest.raises(AdapterError, match="tells its scale twice"):
        read(path, factors() | {f"{QUERY}.alpha": torch.tensor(1.0)}, config={"transformer.r": 2})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (factors("transformer.blocks.7.to_q"), r"2 of 2 tensors .* mean no weight of the bundle: transformer.blocks.7"),
        (factors("blocks.9.to_k"), r"--without blocks.9.to_k"),
        (factors() | factors("text_encoder.layers.0.q_proj"), r"2 of 4 .* has no text_encoder, its callers give it"),
        ({f"{QUERY}.lora_A.weight": torch.ones(2, 4)}, "has one factor"),
        (factors() | {f"{QUERY}.alpha": torch.ones(2)}, "an alpha is one number"),
        (factors() | {f"{QUERY}.alpha": torch.tensor(math.inf)}, "an alpha is a finite number"),
        (factors() | {"transformer.blocks.1.to_q.alpha": torch.tensor(1.0)}, "an alpha of .* and no factors"),
        (factors() | {f"{QUERY}.bias": torch.ones(OUT)}, "holds factors of a LoRA and 1 tensors that are none"),
        (factors() | factors("blocks.0.to_q"), f"two LoRAs for {QUERY}.weight"),
        (factors(rank=0), "has rank 0"),
        ({name: tensor.t().contiguous() for name, tensor in factors().items()}, "does not fit"),
        (factors("transformer.patch"), r"lora_B \(6, 2\) and lora_A \(2, 4\) make no \(6, 3, 2, 2\)"),
        (factors("transformer.count"), r"is of torch.int64 in the bundle, into which nothing can be put"),
        (factors(dtype=torch.int32), "is of I32; weights are of floats"),
        (factors() | {f"{QUERY}.lora_B.bias": torch.ones(OUT)}, "is a LoRA with biases"),
        (factors() | {f"{QUERY}.lora_magnitude_vector": torch.ones(OUT)}, "is a DoRA"),
        ({f"{QUERY}.hada_w1_a": torch.ones(OUT)}, "is a LoHa or LoKr"),
        ({"emb.lora_embedding_A": torch.ones(2, 3)}, "is a LoRA of embeddings"),
    ],
)
def test_what_does_not_fit_is_named(path, tensors, message):
    with pytest.raises(AdapterError, match=message):
        read(path, tensors)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite(path, value):
    given = factors()
    given[f"{QUERY}.lora_B.weight"][1, 1] = value
    with pytest.raises(AdapterError, match=f"{QUERY}.lora_B.weight of the adapter holds NaN or infinity"):
        read(path, given).of(f"{QUERY}.weight", torch.zeros(OUT, IN), 1.0)
    with pytest.raises(AdapterError, match=r"numbers are too large for torch.float16"):
        read(path, factors()).of(f"{QUERY}.weight", torch.zeros(OUT, IN, dtype=torch.float16), 1e9)


def test_a_name_that_could_be_of_two_models(path):
    components = ("transformer", "vae")
    with pytest.raises(AdapterError, match=r"could be transformer.blocks.1.to_q.weight or vae.blocks.1.to_q.weight"):
        read(path, factors("blocks.1.to_q"), components=components)
    assert only(path, factors("vae.blocks.1.to_q"), components=components)[0] == "vae.blocks.1.to_q.weight"


def test_parts_are_left_out_knowingly(path):
    given = factors() | factors("text_encoder.layers.0.q_proj") | factors("transformer.proj_out")
    found = read(path, given, without=("text_encoder", "transformer.proj_out"))
    assert list(found.by_weight) == [f"{QUERY}.weight"]
    with pytest.raises(AdapterError, match=r"nothing in .* is of 'text_enc', which is to be left out"):
        read(path, given, without=("text_enc",))
    with pytest.raises(AdapterError, match=r"nothing of .* is left"):
        read(path, given, without=("text_encoder", "transformer"))


# --- whole weights ---------------------------------------------------------------------------------------------------


def test_whole_weights(path):
    given = {f"{QUERY}.weight": torch.randn(OUT, IN).half(), "blocks.0.to_q.bias": torch.randn(OUT)}
    found = read(path, given)
    assert found.kind == "weights"
    assert found.by_weight == {
        f"{QUERY}.weight": Whole(f"{QUERY}.weight"),
        f"{QUERY}.bias": Whole("blocks.0.to_q.bias"),
    }
    made = found.of(f"{QUERY}.weight", torch.zeros(OUT, IN), 1.0)
    assert torch.equal(made, given[f"{QUERY}.weight"].float())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{QUERY}.weight": torch.ones(IN, OUT)}, r"has the shape \(4, 6\) .* and \(6, 4\) in the bundle"),
        ({f"{QUERY}.weight": torch.ones(OUT, IN, dtype=torch.int8)}, "is of I8; weights are of floats"),
        ({f"{QUERY}.weight": torch.ones(OUT, IN), "blocks.0.to_q.weight": torch.ones(OUT, IN)}, "twice"),
        ({"other.weight": torch.ones(2)}, "1 of 1 tensors .* mean no weight of the bundle: other.weight"),
    ],
)
def test_whole_weights_that_do_not_fit(path, tensors, message):
    with pytest.raises(AdapterError, match=message):
        read(path, tensors)


# --- other forms -----------------------------------------------------------------------------------------------------


def kohya():
    name = "lora_transformer_single_transformer_blocks_0_attn_to_q"
    return {
        f"{name}.lora_down.weight": torch.randn(RANK, IN),
        f"{name}.lora_up.weight": torch.randn(OUT, RANK),
        f"{name}.alpha": torch.tensor(1.0),
    }


def test_another_programs_form_is_converted_by_diffusers(path):
    pytest.importorskip("diffusers")
    stored = {"transformer.single_transformer_blocks.0.attn.to_q.weight": Place(0, 0, torch.float32, (OUT, IN))}
    given = kohya()
    safetensors.torch.save_file(given, path)
    found = changes(open_adapter(path), stored, ("transformer",), (), "FluxPipeline")
    ((name, _),) = found.by_weight.items()
    added = found.of(name, torch.zeros(OUT, IN), 1.0)
    down, up, alpha = given.values()
    assert torch.allclose(added, alpha / RANK * up @ down, rtol=0, atol=1e-6)


def test_projections_that_another_program_has_in_one(path):
    """And its names for a text encoder, which is left out by the name that diffusers has for it."""
    pytest.importorskip("diffusers")
    block = "transformer.transformer_blocks.0.attn"
    stored = {f"{block}.to_{part}.weight": Place(0, 0, torch.float32, (OUT, IN)) for part in "qkv"}
    name, text = "lora_unet_double_blocks_0_img_attn_qkv", "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    given = {}
    for module, rows in ((name, 3 * OUT), (text, OUT)):
        given |= {
            f"{module}.lora_down.weight": torch.randn(RANK, IN),
            f"{module}.lora_up.weight": torch.randn(rows, RANK),
            f"{module}.alpha": torch.tensor(4.0),
        }
    safetensors.torch.save_file(given, path)
    with pytest.raises(AdapterError, match=r"has no text_encoder, .* \(--without text_encoder\)"):
        changes(open_adapter(path), stored, ("transformer",), (), "FluxPipeline")
    found = changes(open_adapter(path), stored, ("transformer",), ("text_encoder",), "FluxPipeline")
    assert set(found.by_weight) == set(stored)
    added = torch.cat([found.of(weight, torch.zeros(OUT, IN), 0.5) for weight in stored])
    wanted = 0.5 * 4.0 / RANK * given[f"{name}.lora_up.weight"] @ given[f"{name}.lora_down.weight"]
    assert torch.allclose(added, wanted, rtol=0, atol=1e-5)


def test_another_programs_form_that_diffusers_does_not_take(path):
    pytest.importorskip("diffusers")
    with pytest.raises(
        AdapterError, match=r"diffusers, which converts it, is not here or not for DiTPipeline; load it"
    ):
        read(path, kohya(), pipeline="DiTPipeline")
    odd = {"lora_unet_odd.lora_down.weight": torch.ones(2, 2), "lora_unet_odd.lora_up.weight": torch.ones(2, 2)}
    with pytest.raises(AdapterError, match="which diffusers does not convert"):
        read(path, odd, pipeline="FluxPipeline")


def test_a_converter_that_drops_tensors_is_found_out(path, monkeypatch):
    import diffusers

    class Loader:
        @staticmethod
        def lora_state_dict(tensors, return_alphas):
            (down,) = (tensor for name, tensor in tensors.items() if "lora_down" in name)
            return {f"{QUERY}.lora_A.weight": down * 1.0}

    monkeypatch.setattr(diffusers, "FluxPipeline", Loader)
    with pytest.raises(AdapterError, match=r"of which diffusers leaves out 1 tensors: .*lora_up"):
        read(path, kohya(), pipeline="FluxPipeline")


# --- files -----------------------------------------------------------------------------------------------------------


def test_files_that_are_none(path, tmp_path):
    safetensors.torch.save_file(factors(), path)
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[:30], struct.pack("<Q", 2**62) + b"{}", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(AdapterError, match="cannot be read as a safetensors file"):
            open_adapter(path)
    with pytest.raises(AdapterError, match="No such file"):
        open_adapter(tmp_path / "nowhere.safetensors")
    with pytest.raises(AdapterError, match="it is a device"):
        open_adapter("/dev/null")
    path.unlink()
    with pytest.raises(AdapterError, match="holds 0 safetensors files"):
        open_adapter(tmp_path)
    for name in ("a", "b"):
        safetensors.torch.save_file(factors(), tmp_path / f"{name}.safetensors")
    with pytest.raises(AdapterError, match=r"holds 2 safetensors files: a.safetensors, b.safetensors; name the one"):
        open_adapter(tmp_path)
    safetensors.torch.save_file({}, path)
    with pytest.raises(AdapterError, match="holds no tensors"):
        open_adapter(path)


@pytest.mark.parametrize("name", ["lora.bin", "lora.PT", "lora.ckpt", "lora.pth"])
def test_pickles_are_not_opened(tmp_path, name):
    with pytest.raises(AdapterError, match="is a pickle by its name, which runs code when it is opened, so it was not"):
        open_adapter(tmp_path / name)


def test_a_configuration_that_cannot_be_read(path):
    safetensors.torch.save_file(factors(), path, metadata={METADATA: "{"})
    with pytest.raises(AdapterError, match=r"lora_adapter_metadata in the header of .* cannot be read"):
        open_adapter(path)
    path.with_name("adapter_config.json").write_text("x")
    assert only(path, factors())[1].factor == 1.0, "which is of another file"
    safetensors.torch.save_file(factors("base_model.model.blocks.0.to_q"), path)
    with pytest.raises(AdapterError, match=r"adapter_config.json cannot be read"):
        open_adapter(path)


# --- several files with their index ----------------------------------------------------------------------------------

WHOLE = {
    "blocks.0.to_q.weight": torch.ones(OUT, IN),
    "blocks.0.to_q.bias": torch.full((OUT,), 2.0),
    "blocks.1.to_q.weight": torch.full((OUT, IN), 3.0),
}
SHARDS = {name: f"model-{number}-of-2.safetensors" for name, number in zip(WHOLE, (1, 2, 1), strict=True)}


def in_shards(folder, places=SHARDS, index="model.safetensors.index.json"):
    """The weights in two files, and an index that says so (or ``places``)."""
    for shard in set(SHARDS.values()):
        held = {name: WHOLE[name] for name in WHOLE if SHARDS[name] == shard}
        safetensors.torch.save_file(held, folder / shard)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return folder / index


def test_weights_in_several_files(tmp_path):
    index = in_shards(tmp_path)
    for place in (index, tmp_path):
        file = open_adapter(place)
        assert file.name == index.name
        found = changes(file, STORED, ("transformer",))
        assert found.by_weight == {f"transformer.{name}": Whole(name) for name in WHOLE}
        for name, tensor in WHOLE.items():
            stored = STORED[f"transformer.{name}"]
            made = found.of(f"transformer.{name}", torch.zeros(stored.shape, dtype=stored.dtype), 1.0)
            assert torch.equal(made, tensor.to(stored.dtype))
    content = b"".join((tmp_path / f"model-{number}-of-2.safetensors").read_bytes() for number in (1, 2))
    assert file.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "shard", ["../model-1-of-2.safetensors", "/tmp/x.safetensors", "a/b.safetensors", "x.bin", "", ".x.safetensors", 3]
)
def test_an_index_that_leaves_its_folder(tmp_path, shard):
    inside = tmp_path / "inside"
    inside.mkdir()
    in_shards(tmp_path)
    index = in_shards(inside, {**SHARDS, "blocks.0.to_q.bias": shard})
    with pytest.raises(AdapterError, match="no name of a safetensors file beside it"):
        open_adapter(index)


def test_an_index_that_is_not_of_its_files(tmp_path):
    few = {name: SHARDS[name] for name in list(WHOLE)[:2]}
    with pytest.raises(
        AdapterError, match=r"says of model-1-of-2\.safetensors other tensors than it holds \(blocks\.1"
    ):
        open_adapter(in_shards(tmp_path, few))
    moved = {**SHARDS, "blocks.1.to_q.weight": "model-2-of-2.safetensors"}
    with pytest.raises(AdapterError, match="other tensors than it holds"):
        open_adapter(in_shards(tmp_path, moved))
    (tmp_path / "model-2-of-2.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": SHARDS}))
    with pytest.raises(AdapterError, match=r"model-2-of-2\.safetensors cannot be read as a safetensors file"):
        open_adapter(index)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "[" * 10**5, "\0"])
def test_what_is_no_index(tmp_path, text):
    index = in_shards(tmp_path)
    index.write_text(text)
    with pytest.raises(AdapterError, match="is no index of safetensors files"):
        open_adapter(index)


def test_a_folder_with_several_sets_of_weights(tmp_path):
    index = in_shards(tmp_path)
    safetensors.torch.save_file(WHOLE, tmp_path / "other.safetensors")
    with pytest.raises(AdapterError, match=r"several sets of weights, .*other\.safetensors; name one"):
        open_adapter(tmp_path)
    (tmp_path / "other.safetensors").unlink()
    in_shards(tmp_path, index="model.fp16.safetensors.index.json")
    with pytest.raises(AdapterError, match="several sets of weights"):
        open_adapter(tmp_path)
    assert len(open_adapter(index).tensors) == len(WHOLE)
