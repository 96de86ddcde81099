"""`irpe.save` and `irpe.load`: what was saved comes back, by nobody else without its tables, and runs nothing."""

import copy
import json
import math
import pickle
import socket

import pytest
import torch
from PIL import Image
from torch import nn
from train_tiny import RPE, irpe

import irpe as package
from irpe import equip, rpe_parameters, unequip
from irpe.prediction import Guess, Preprocessing

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers", minversion="5.18")
torchvision = pytest.importorskip("torchvision")

from timm.models import save_for_hf  # noqa: E402

from irpe import models as _released  # noqa: E402, F401

CROSS = "rpe-20-cross-ctx-0-qv"
TIMM = {
    "vit": ("vit_tiny_patch16_224", dict(img_size=(32, 48), depth=2, embed_dim=24)),
    "distilled": ("deit_tiny_distilled_patch16_224", dict(img_size=(32, 48), depth=1, embed_dim=24)),
    "eva": ("eva02_tiny_patch14_224", dict(img_size=(28, 42), depth=1, embed_dim=24)),
    "beit": ("beit_base_patch16_224", dict(img_size=(32, 48), depth=1, embed_dim=24)),
    "swin": ("swin_tiny_patch4_window7_224", dict(img_size=(56, 112), embed_dim=24, depths=(1, 1), num_heads=(3, 3))),
}
VIT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32)
VIT |= dict(patch_size=8, num_labels=3)


def filled(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for table in rpe_parameters(model)["params"]:
            table.normal_(std=0.2)
    return model.eval()


def of_timm(family="vit", rpe=RPE, **options):
    torch.manual_seed(0)
    name, arguments = TIMM[family]
    return filled(equip(timm.create_model(name, num_classes=7, **arguments, **options), rpe))


def of_transformers(cls=transformers.ViTForImageClassification, rpe=RPE, **options):
    torch.manual_seed(0)
    return filled(equip(cls(cls.config_class(**VIT, **options)), rpe))


def of_torchvision(rpe=RPE):
    torch.manual_seed(0)
    return filled(equip(torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3), rpe))


def same(one, other, shape):
    image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [getattr(model(image), "logits", model(image)) for model in (one, other)]
    return torch.equal(*outputs)


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "picture.png"
    pixels = torch.randint(0, 255, (40, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(file)
    return file


@pytest.mark.parametrize("family", TIMM)
def test_timm(family, tmp_path):
    model = of_timm(family)
    assert package.save(model, tmp_path / "model", classes=list("abcdefg")) == tmp_path / "model"
    again = package.load(tmp_path / "model")
    size = TIMM[family][1]["img_size"]
    assert type(again) is type(model) and same(again, model, (3, *size))
    assert again.predict.classes == list("abcdefg")
    assert again.predict.preprocessing.size == size
    # once more, over its own folder
    package.save(again, tmp_path / "model")
    with pytest.raises(ValueError, match="weights='ema', but .* is not the folder of a run"):
        package.load(tmp_path / "model", weights="ema")
    assert package.load(tmp_path / "model").predict.classes == list("abcdefg")
    assert not (unequip(again)._model_args.keys() & {"saved_with_irpe_so_use_irpe_load"})


@pytest.mark.parametrize("family", TIMM)
@pytest.mark.parametrize("own", [False, True])
def test_timm_alone_refuses(family, own, tmp_path):
    """Also with a new head, where timm does not load strictly."""
    model = of_timm(family)
    if own:
        package.save(model, tmp_path / "model")
    else:
        save_for_hf(model, tmp_path / "model", safe_serialization=True)
    for options in ({}, dict(num_classes=3)):
        with pytest.raises(TypeError, match="saved_with_irpe_so_use_irpe_load"):
            timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, **options)
    assert same(package.load(tmp_path / "model"), model, (3, *TIMM[family][1]["img_size"]))
    # and not the plain model
    save_for_hf(unequip(model), tmp_path / "plain", safe_serialization=True)
    plain = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
    assert same(plain, model, (3, *TIMM[family][1]["img_size"]))


def test_some_blocks_and_several_encodings(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=(32, 48), depth=4, embed_dim=24)
    equip(model, RPE, blocks=[3])
    equip(model, CROSS, blocks=[0, 1])
    package.save(filled(model), tmp_path / "model")
    again = package.load(tmp_path / "model")
    assert repr(again) == repr(model) and same(again, model, (3, 32, 48))


def test_the_released_deits(tmp_path):
    name = "deit_tiny_patch16_224_ctx_product_50_shared_k"
    model = filled(timm.create_model(name, num_classes=7, img_size=(32, 48), depth=1))
    package.save(model, tmp_path / "model")
    assert same(package.load(tmp_path / "model"), model, (3, 32, 48))
    # timm knows them by name, tables included
    assert same(timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval(), model, (3, 32, 48))


@pytest.mark.parametrize("rpe", [RPE, CROSS])
def test_torchvision(rpe, tmp_path, picture):
    model = of_torchvision(rpe)
    preset = torchvision.models.ViT_B_16_Weights.DEFAULT.transforms(crop_size=32, resize_size=40)
    package.save(model, tmp_path / "model", classes=["a", "b", "c"], processor=preset)
    again = package.load(tmp_path / "model")
    assert same(again, model, (3, 32, 32)) and repr(again) == repr(model)
    with torch.no_grad():
        scores = model(preset(Image.open(picture))[None]).softmax(1)[0]
    guesses = dict(again.predict(picture))
    assert [guesses[one] for one in "abc"] == pytest.approx(scores.tolist(), abs=2e-3)
    package.save(model, tmp_path / "blind")
    with pytest.raises(ValueError, match="it is not known how pictures are prepared"):
        package.load(tmp_path / "blind").predict(picture)


LOADERS = {
    "class": lambda folder: transformers.ViTForImageClassification.from_pretrained(folder),
    "arguments": lambda folder: transformers.ViTForImageClassification.from_pretrained(
        folder, attn_implementation="eager", num_labels=5, ignore_mismatched_sizes=True, num_hidden_layers=2
    ),
    "Auto class": lambda folder: transformers.AutoModelForImageClassification.from_pretrained(folder),
    "AutoModel": lambda folder: transformers.AutoModel.from_pretrained(folder),
    "AutoConfig": lambda folder: transformers.AutoConfig.from_pretrained(folder),
    "features": lambda folder: transformers.pipeline("image-feature-extraction", model=str(folder)),
    "pipeline": lambda folder: transformers.pipeline("image-classification", model=str(folder)),
    "remote code": lambda folder: transformers.AutoModel.from_pretrained(folder, trust_remote_code=True),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("own", [False, True])
def test_transformers_alone_refuses(loader, own, tmp_path):
    """The one silent wrong answer that there was: other scores, as the tables were left out."""
    model = of_transformers()
    if own:
        package.save(model, tmp_path)
    else:
        model.save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"this model has iRPE.*load it with irpe\.load\(folder\)"):
        LOADERS[loader](tmp_path)


def test_transformers(tmp_path, picture):
    model = of_transformers()
    assert model.config.to_dict()["num_hidden_layers"] == 2  # in memory as it was
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    package.save(model, tmp_path / "model", classes=["a", "b", "c"], processor=processor)
    again = package.load(tmp_path / "model")
    assert type(again) is type(model) and same(again, model, (3, 32, 32))
    assert again.config.num_hidden_layers == 2
    guesses = again.predict(picture, top=3)
    pipeline = transformers.pipeline("image-classification", model=again, image_processor=processor)
    told = {one["label"]: one["score"] for one in pipeline(str(picture), top_k=3)}
    assert dict(guesses) == pytest.approx(told, abs=1e-6)
    # and `save_pretrained` of what was loaded
    again.save_pretrained(tmp_path / "again")
    assert same(package.load(tmp_path / "again"), model, (3, 32, 32))


def test_a_pair_of_towers(tmp_path):
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    vision = dict(**tower, image_size=32, patch_size=8)
    text = dict(**tower, vocab_size=99, max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    filled(equip(model, RPE))
    package.save(model, tmp_path)
    for cls in (transformers.CLIPModel, transformers.CLIPVisionModel, transformers.AutoModel):
        with pytest.raises(Exception, match="this model has iRPE"):
            cls.from_pretrained(tmp_path)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pooled = [one.vision_model(image).pooler_output for one in (model, package.load(tmp_path))]
    assert torch.equal(*pooled)


def test_a_class_that_equips_itself_reads_its_own_folder(tmp_path):
    class Mine(transformers.ViTForImageClassification):
        def __init__(self, config):
            super().__init__(config)
            equip(self, RPE)

    model = filled(Mine(transformers.ViTConfig(**VIT)))
    model.save_pretrained(tmp_path)
    assert same(Mine.from_pretrained(tmp_path), model, (3, 32, 32))
    for loader in ("Auto class", "AutoModel", "AutoConfig", "pipeline"):
        with pytest.raises(ValueError, match="vit-with-irpe"):
            LOADERS[loader](tmp_path)
    with pytest.raises(ValueError, match=r"'Mine', which is no model of transformers.*from_pretrained"):
        package.load(tmp_path)


def test_timm_inside_transformers(tmp_path):
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args=dict(img_size=(32, 48), depth=2, embed_dim=24), num_labels=5
    )
    cls = transformers.TimmWrapperForImageClassification
    torch.manual_seed(0)
    model = filled(equip(cls(config), RPE))
    model.save_pretrained(tmp_path)
    for one in (cls, transformers.AutoModelForImageClassification):
        with pytest.raises(Exception, match="this model has iRPE"):
            one.from_pretrained(tmp_path)
    assert same(package.load(tmp_path), model, (3, 32, 48))
    unequip(model).save_pretrained(tmp_path / "plain")
    assert same(cls.from_pretrained(tmp_path / "plain"), model, (3, 32, 48))


@pytest.mark.slow
def test_training_of_transformers_goes_on(tmp_path):
    """Trainer reads the config.json of its own checkpoints as plain values."""
    pytest.importorskip("accelerate")
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": k % 3} for k in range(8)]
    options = dict(output_dir=str(tmp_path), use_cpu=True, report_to=[], save_strategy="steps", save_steps=1)
    options |= dict(per_device_train_batch_size=4, disable_tqdm=True, logging_strategy="no")
    model = of_transformers()
    trainer = transformers.Trainer(model, transformers.TrainingArguments(max_steps=1, **options), train_dataset=data)
    trainer.train()
    other = of_transformers()
    trainer = transformers.Trainer(other, transformers.TrainingArguments(max_steps=2, **options), train_dataset=data)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    assert same(package.load(tmp_path / "checkpoint-2"), other.eval(), (3, 32, 32))


def test_plain_models_are_saved_as_well(tmp_path):
    plain = unequip(of_timm())
    package.save(plain, tmp_path / "timm")
    assert same(package.load(tmp_path / "timm"), plain, (3, 32, 48))
    assert same(timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval(), plain, (3, 32, 48))
    plain = unequip(of_transformers())
    package.save(plain, tmp_path / "transformers")
    assert same(package.load(tmp_path / "transformers"), plain, (3, 32, 32))


def test_a_run(tiny_run, tmp_path):
    from irpe.runs.tensors import read_safetensors
    from irpe.train.run import settings_of, weights_of

    model = package.load(tiny_run)
    best = read_safetensors(weights_of(tiny_run, "best"))
    assert all(torch.equal(one, best[name]) for name, one in model.state_dict().items())
    last = package.load(tiny_run, weights="last").state_dict()
    assert any(not torch.equal(one, best[name]) for name, one in last.items())
    _, classes = settings_of(tiny_run)
    assert model.predict.classes == classes == [f"digit{k}" for k in range(4)]
    files = sorted((tiny_run.parent / "data" / "val").rglob("*.png"))
    guesses = model.predict(files, batch_size=7)
    right = sum(one[0].label == file.parent.name for one, file in zip(guesses, files, strict=True))
    evaluated = irpe("evaluate", tiny_run, "--device", "cpu", "--json", tmp_path / "score.json")
    assert evaluated.exit_code == 0
    assert 100 * right / len(files) == pytest.approx(json.loads((tmp_path / "score.json").read_text())["top1"])
    assert all(sum(one.score for one in each) == pytest.approx(1) for each in guesses)
    # one of several is the same alone, also as an image
    assert model.predict(files[3])[0].label == guesses[3][0].label
    assert model.predict(Image.open(files[3]), top=1)[0].score == pytest.approx(guesses[3][0].score, abs=1e-5)
    # what the run's own README says
    text = (
        (tiny_run / "README.md").read_text().replace("THIS_FOLDER", str(tiny_run)).replace("picture.jpg", str(files[0]))
    )
    names = {}
    exec("\n".join(line.strip() for line in text.splitlines() if line.startswith(("    import", "    found"))), names)
    assert names["found"] == model.predict(files[0])
    assert f"irpe predict {tiny_run} {files[0]}" in text and "resized to cover 8x13, the middle of 8x12 pixels" in text
    # what is published is the same model
    package.save(model, tmp_path / "saved")
    again = package.load(tmp_path / "saved")
    assert again.predict(files[:5]) == model.predict(files[:5])
    assert again.predict.preprocessing == model.predict.preprocessing


def test_predict_stays_with_its_model(tiny_run):
    model = package.load(tiny_run)
    twin = copy.deepcopy(model)
    assert twin.predict.model is twin
    assert pickle.loads(pickle.dumps(model)).predict.model is not model
    assert "predict" not in "".join(model.state_dict())


def test_preprocessing_is_what_evaluation_does():
    image = Image.fromarray(torch.randint(0, 255, (30, 64), dtype=torch.uint8).numpy())
    made = Preprocessing((8, 12), (0.5,), (0.25,), 0.5, "bilinear").transform()(image)
    assert made.shape == (1, 8, 12)
    assert Guess("a", 0.5)._asdict() == {"label": "a", "score": 0.5}
    with pytest.raises(ValueError, match=r"here: .* is no preprocessing; expected size"):
        Preprocessing.from_dict(
            {"size": [8, -1], "mean": [0], "std": [1], "crop_pct": 1, "interpolation": "box"}, "here"
        )


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(TypeError, match=r"model is a torch.nn.*Linear; expected a model of timm"):
        package.save(nn.Linear(2, 3), tmp_path / "model")
    with pytest.raises(TypeError, match="made by timm.create_model"):
        package.save(timm.models.vision_transformer.VisionTransformer(img_size=(8, 12), depth=1), tmp_path / "model")
    model = of_timm()
    model.head = nn.Sequential(nn.Linear(24, 9), nn.Linear(9, 7))
    with pytest.raises(ValueError, match="changed after it was built.*head"):
        package.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    vit = of_torchvision()
    vit.heads = nn.Linear(16, 9)
    with pytest.raises(ValueError, match="changed after it was built.*heads"):
        package.save(vit, tmp_path / "vit")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("mine")
    with pytest.raises(ValueError, match="holds files that irpe.save has not written"):
        package.save(of_timm(), tmp_path / "mine")
    assert (tmp_path / "mine" / "config.json").read_text() == "mine"


def test_folders_of_strangers(tmp_path):
    """Names of files, of code and of places elsewhere are refused; nothing is fetched."""
    package.save(of_timm(), tmp_path / "timm")
    file = tmp_path / "timm" / "config.json"
    config = json.loads(file.read_text())

    def refuse(changed, words, place=file):
        place.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=words):
            package.load(place.parent)

    refuse(config | {"architecture": "hf-hub:user/name"}, "timm has no model 'hf-hub:user/name'")
    refuse(config | {"architecture": "no_such_model"}, "timm has no model 'no_such_model'")
    for name in ("checkpoint_path", "pretrained"):
        refuse(config | {"model_args": config["model_args"] | {name: "x"}}, f"model_args has {name}")
    refuse(config | {"architecture": "vit_tiny_patch16_224:x"}, "timm has no model")
    for name in ("cache_dir", "url", "hf_hub_id", "state_dict", "kwargs_filter", "features_only"):
        refuse(config | {"model_args": config["model_args"] | {name: "x"}}, f"model_args has {name}")
    refuse(config | {"model_args": {"depth": 3}}, "does not fit the model|damaged")
    refuse(config | {"model_args": {"strange": 3}}, "damaged, or of another version.*strange")
    file.write_text(json.dumps(config))
    weights = tmp_path / "timm" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="damaged: its checksum is another one"):
        package.load(tmp_path / "timm")
    weights.unlink()

    class Code:
        def __reduce__(self):
            return (exec, ("raise SystemExit('code was run')",))

    torch.save({"state_dict": Code()}, tmp_path / "timm" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="Python objects besides tensors"):
        package.load(tmp_path / "timm")

    package.save(of_transformers(), tmp_path / "vit")
    file = tmp_path / "vit" / "config.json"
    config = json.loads(file.read_text())
    refuse(config | {"auto_map": {"AutoModel": "code.Model"}}, "auto_map.*neither fetched nor run", file)
    refuse(config | {"architectures": ["Trainer"]}, "'Trainer', which is no model of transformers", file)
    refuse(config | {"architectures": None}, "None, which is no model of transformers", file)
    refuse([1, 2], "holds no settings", file)
    refuse(config | {"irpe_num_hidden_layers": "many"}, "is not of a ViTForImageClassification", file)
    file.write_text(json.dumps(config))
    (file.parent / "preprocessor_config.json").write_text('{"image_processor_type": "Strange"}')
    with pytest.raises(ValueError, match="the image processor of .* cannot be read"):
        package.load(file.parent)


@pytest.fixture
def walled(monkeypatch):
    """Whoever asks the network fails the test, also where the error is caught."""
    told = []

    def refuse(*arguments, **options):
        told.append(arguments)
        raise OSError("not in this test")

    for where, name in ((socket.socket, "connect"), (socket, "create_connection"), (socket, "getaddrinfo")):
        monkeypatch.setattr(where, name, refuse)
    yield
    assert told == []


def wrapped(**options):
    arguments = dict(img_size=(32, 48), depth=1, embed_dim=24)
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args=arguments, num_labels=5, **options
    )
    torch.manual_seed(0)
    return transformers.TimmWrapperForImageClassification(config)


@pytest.mark.parametrize("rpe", [RPE, None])
def test_models_of_timm_in_folders_of_strangers(rpe, tmp_path, walled):
    """transformers hands the name and the arguments to timm, which takes addresses and files for both."""
    model = wrapped() if rpe is None else filled(equip(wrapped(), rpe))
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    weights = tmp_path / "other.pth"
    torch.save({name: torch.zeros_like(one) for name, one in model.timm_model.state_dict().items()}, weights)
    name = "architecture" if rpe is None else "irpe_architecture"
    assert config[name] == "vit_tiny_patch16_224"

    def refuse(changed, words):
        file.write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=f"config.json has {words}.*neither fetched nor run"):
            package.load(tmp_path)

    refuse({name: "hf-hub:user/name"}, "architecture: 'hf-hub:user/name', which is none of timm")
    refuse({name: f"local-dir:{tmp_path}"}, "architecture: 'local-dir:")
    refuse({"irpe_architecture": "vit_tiny_patch16_224", "architecture": "hf-hub:user/name", "irpe": None}, "arch")
    arguments = config["model_args"]
    refuse({"model_args": arguments | {"checkpoint_path": str(weights)}}, "model_args with checkpoint_path")
    refuse({"model_args": arguments | {"pretrained_cfg": {"file": str(weights)}}}, "model_args with pretrained_cfg")
    refuse({"configuration_files": ["config.1.0.0.json"]}, "configuration_files")
    file.write_text(json.dumps(config))
    assert same(package.load(tmp_path), model.eval(), (3, 32, 48))


def test_parts_of_folders_of_strangers(tmp_path, walled):
    """The tower of a model is one as well; so are its processor, and the index of its weights."""

    def refuse(values, words, name="config.json"):
        (tmp_path / name).write_text(json.dumps(values))
        with pytest.raises(ValueError, match=words):
            package.load(tmp_path)

    tower = {"model_type": "timm_wrapper", "architecture": "hf-hub:user/name"}
    llava = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    refuse(llava | {"vision_config": tower}, "architecture: 'hf-hub:user/name', which is none of timm")
    tower = {"model_type": "timm_wrapper", "architecture": "resnet18", "model_args": {"checkpoint_path": "a.pth"}}
    refuse(llava | {"vision_config": tower}, "model_args with checkpoint_path")
    # what nobody has named, and transformers asks the hub for
    words = "leaves parts of the model to the hub, which is not asked"
    refuse({"model_type": "edgetam_vision_model", "architectures": ["EdgeTamVisionModel"]}, words)
    upernet = {"model_type": "upernet", "architectures": ["UperNetForSemanticSegmentation"]}
    refuse(upernet | {"backbone": "resnet50"}, words)
    detr = {"model_type": "detr", "architectures": ["DetrForObjectDetection"], "use_timm_backbone": False}
    refuse(detr, words)
    from irpe.detect.model import load

    with pytest.raises(ValueError, match=words):
        load(tmp_path)  # as `irpe detect --pretrained` does
    of_transformers().save_pretrained(tmp_path)
    one_former = {"image_processor_type": "OneFormerImageProcessor", "class_info_file": "a.json"}
    refuse(one_former | {"repo_path": "user/name"}, "repo_path: 'user/name'", "preprocessor_config.json")
    (tmp_path / "preprocessor_config.json").unlink()
    weights = tmp_path / "model.safetensors"
    weights.rename(tmp_path.parent / "shard.safetensors")
    index = {"metadata": {}, "weight_map": {"vit.embeddings.cls_token": "../shard.safetensors"}}
    refuse(index, "names '../shard.safetensors'; expected files beside it", "model.safetensors.index.json")
    (tmp_path.parent / "shard.safetensors").unlink()


def contents(folder):
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


def test_a_refused_save_leaves_the_model_of_before(tmp_path):
    """Whatever is refused, and wherever: the folder is what it was, and nothing lies beside it."""
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    good = {"timm": of_timm(), "vit": of_torchvision(), "hf": of_transformers()}
    places = {
        name: package.save(model, tmp_path / name, processor=processor if name == "hf" else None)
        for name, model in good.items()
    }
    before = {name: contents(place) for name, place in places.items()}

    def refuse(name, error, words, **options):
        with pytest.raises(error, match=words):
            package.save(good[name], places[name], **options)
        assert contents(places[name]) == before[name]
        assert sorted(one.name for one in tmp_path.iterdir()) == ["hf", "timm", "vit"]

    for name in good:
        refuse(name, TypeError, "processor is a int", processor=3)
        refuse(name, ValueError, "classes has 2 names, but the model has . outputs", classes=["a", "b"])
    refuse(
        "timm", ValueError, "processor: .* is no preprocessing", processor=Preprocessing((8, 12), (0,) * 4, (1,) * 4)
    )
    good["timm"].head, good["vit"].heads = nn.Linear(24, 9), nn.Linear(16, 9)
    good["timm"]._model_args["depth"] = 3
    refuse("timm", ValueError, "changed after it was built")
    refuse("vit", ValueError, "changed after it was built")
    good["hf"].config.auto_map = {"AutoModel": "code.Model"}
    refuse("hf", ValueError, "auto_map")
    good["hf"].save_pretrained = lambda folder: (folder / "config.json").write_text("{") and 1 / 0
    refuse("hf", ZeroDivisionError, "division by zero")
    assert all(package.load(place) is not None for place in places.values())


def test_a_killed_save_says_where_the_model_is(tmp_path):
    model = of_timm()
    package.save(model, tmp_path / "model", classes=list("abcdefg"))
    # as it is between the two steps that put another folder into its place
    (tmp_path / "model").rename(tmp_path / ".model.123.old")
    with pytest.raises(ValueError, match=r"model was being replaced when .* whole, in .*\.model\.123\.old"):
        package.load(tmp_path / "model")
    package.save(model, tmp_path / "model")
    assert same(package.load(tmp_path / "model"), model, (3, 32, 48))
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_nothing_of_the_model_of_before_is_left(tmp_path):
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1] * 3)
    place = package.save(of_transformers(), tmp_path / "model", processor=processor)
    assert package.load(place).predict.processor.image_mean == (0.1,) * 3
    for name in ("pytorch_model.bin", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (place / name).write_text("of before")
    (place / "README.md").write_text("mine")
    model = of_transformers()
    package.save(model, place)
    assert {one.name for one in place.iterdir()} == {"README.md", "config.json", "irpe.json", "model.safetensors"}
    assert package.load(place).predict.processor is None and (place / "README.md").read_text() == "mine"
    # and of another library
    package.save(of_timm(), place)
    assert {one.name for one in place.iterdir()} == {"README.md", "config.json", "irpe.json", "model.safetensors"}
    assert same(package.load(place), of_timm(), (3, 32, 48))


@pytest.mark.parametrize("make", [of_timm, of_torchvision, of_transformers])
def test_every_file_of_weights_has_a_checksum(make, tmp_path):
    package.save(make(), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="damaged: its checksum is another one"):
        package.load(tmp_path / "model")


def test_bars_come_back(tmp_path):
    from transformers.utils import logging

    from irpe.detect.saved import save

    logging.enable_progress_bar()
    processor = transformers.ViTImageProcessor()
    save(of_transformers(), processor, tmp_path / "model")
    assert logging.is_progress_bar_enabled()


def test_classes_are_one_for_each_output(tmp_path):
    for make in (of_timm, of_torchvision, of_transformers):
        with pytest.raises(ValueError, match="classes has 2 names, but the model has [37] outputs; expected one for"):
            package.save(make(), tmp_path / "model", classes=["cat", "dog"])
    # names of a head that was there before are not asked for, and gone with it
    model = package.load(package.save(of_timm(), tmp_path / "model", classes=list("abcdefg")))
    model.reset_classifier(3)
    assert package.load(package.save(model, tmp_path / "three")).predict.classes == ["0", "1", "2"]


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_pictures_are_prepared_as_timm_evaluates(crop_mode, tmp_path):
    from timm.data import create_transform, resolve_model_data_config

    pixels = torch.randint(0, 255, (80, 300, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    model = of_timm(pretrained_cfg_overlay=dict(crop_mode=crop_mode, crop_pct=0.95, input_size=(3, 32, 48)))
    package.save(model, tmp_path / "model")
    again = package.load(tmp_path / "model")
    wanted = create_transform(**resolve_model_data_config(model))(picture)
    assert again.predict.preprocessing.crop_mode == crop_mode
    assert torch.equal(again.predict.prepare(picture), wanted)
    package.save(again, tmp_path / "again")  # by what `predict` has
    assert package.load(tmp_path / "again").predict.preprocessing == again.predict.preprocessing
    grey = Preprocessing((32, 48), (0.5,), (0.25,), 0.9, "bilinear", crop_mode).transform()(picture.convert("L"))
    assert grey.shape == (1, 32, 48)


def test_preprocessing_of_before_and_of_nobody():
    values = {"size": [8, 12], "mean": [0.5], "std": [1], "crop_pct": 1, "interpolation": "box"}
    assert Preprocessing.from_dict(values, "here").crop_mode == "center"
    with pytest.raises(ValueError, match="here: .* is no preprocessing; expected .* and crop_mode"):
        Preprocessing.from_dict(values | {"crop_mode": "stretch"}, "here")


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(channels, tmp_path, picture):
    model = of_timm(in_chans=channels)
    package.save(model, tmp_path / "model")
    again = package.load(tmp_path / "model")
    assert same(again, model, (channels, 32, 48))
    if channels == 1:
        assert len(again.predict(picture)) == 5
    else:
        with pytest.raises(ValueError, match="it is not known how pictures are prepared"):
            again.predict(picture)


def test_models_without_classes_do_not_predict(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(32, 48), depth=1, embed_dim=24)
    package.save(filled(equip(model, RPE)), tmp_path / "timm")
    again = package.load(tmp_path / "timm")
    assert not hasattr(again, "predict") and same(again, model, (3, 32, 48))
    with pytest.raises(ValueError, match="classes has 1 names, but the model has 0 outputs"):
        package.save(model, tmp_path / "timm", classes=["a"])
    hf = filled(equip(transformers.ViTForImageClassification(transformers.ViTConfig(**VIT | dict(num_labels=0))), RPE))
    package.save(hf, tmp_path / "hf")
    assert not hasattr(package.load(tmp_path / "hf"), "predict")


def test_a_distilled_model_of_transformers_predicts(tmp_path, picture):
    model = of_transformers(transformers.DeiTForImageClassificationWithTeacher)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    package.save(model, tmp_path / "model", classes=["a", "b", "c"], processor=processor)
    assert {one.label for one in package.load(tmp_path / "model").predict(picture)} == {"a", "b", "c"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", [of_timm, of_torchvision, of_transformers])
def test_precision_comes_back(make, dtype, tmp_path):
    model = make().to(dtype)
    package.save(model, tmp_path / "model")
    again = package.load(tmp_path / "model")
    own = model.state_dict()
    assert all(one.dtype == own[name].dtype and torch.equal(one, own[name]) for name, one in again.state_dict().items())


def test_how_weights_were_read_once_is_not_saved(tmp_path):
    package.save(of_timm(pretrained_strict=False), tmp_path)
    assert "pretrained_strict" not in (tmp_path / "config.json").read_text()
    assert same(package.load(tmp_path), of_timm(), (3, 32, 48))


def test_shares_of_crops_say_the_size_of_before():
    from irpe.saving.common import share_of

    pairs = [(crop, resize) for resize in range(32, 400, 7) for crop in range(32, resize + 1)]
    assert any(math.floor(crop / (crop / resize)) != resize for crop, resize in pairs)
    assert all(math.floor(crop / share_of(crop, resize)) == resize for crop, resize in pairs)
    assert all(abs(share_of(crop, resize) - crop / resize) < 1e-12 for crop, resize in pairs)


def test_an_exported_file_has_one_set_of_weights(tmp_path):
    with pytest.raises(ValueError, match=r"weights='ema', but .*model\.onnx is not the folder of a run; leave weights"):
        package.load(tmp_path / "model.onnx", weights="ema")


def test_whose_run_it_is_is_told_in_one_place(tmp_path):
    from irpe.detect import run
    from irpe.detect.settings import is_record

    assert run.KIND.is_ours is is_record
    # words that both kinds of runs have, of which one is missing, are of none
    (tmp_path / "settings.json").write_text(json.dumps({"queries": 1, "rpe": "none", "train_scenes": 1}))
    with pytest.raises(ValueError, match="is not of a run of irpe train, or it is damaged"):
        package.load(tmp_path)


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match="does not exist; expected a folder, an .onnx file, or a name on the hub"):
        package.load(tmp_path / "absent" / "there")
    with pytest.raises(ValueError, match="has neither config.json nor settings.json"):
        package.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        package.load(tmp_path / "file")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is of no model of timm, transformers or torchvision"):
        package.load(tmp_path)
