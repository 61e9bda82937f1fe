"""Reconstruction metrics against torch-fidelity, scikit-image, lpips and diffusers themselves; random weights stand in
for Inception's and VGG's."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
import torch_fidelity
from accelerate import PartialState, debug_launcher
from PIL import Image
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.models.vgg import cfgs, make_layers

from eval import reconstruction as evaluation
from eval.reconstruction_metrics import (
    code_statistics,
    frechet_distance,
    inception_features,
    lite0,
    psnr_of_uint8,
    second_moments,
    ssim,
)
from training.losses import MOST_PSNR
from unitok_mllm import UniTokImageProcessorPil, UniTokModel


pytestmark = pytest.mark.full


IMAGES = 10
SIDE = 48
TINY = str(Path(__file__).parents[1] / "unitok_mllm/checkpoints/tiny")


class RandomInception(FeatureExtractorInceptionV3):
    """Keeps the weights that it was made with."""

    def load_state_dict(self, state_dict):
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> Path:
    """A file in the format of torch-fidelity's own weights."""
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.manual_seed(0)
    torch.save({}, path)
    torch.save(RandomInception("random", ["64"], feature_extractor_weights_path=path).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def vgg_weights(tmp_path_factory) -> Path:
    """A file with the names of torchvision's VGG-16."""
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.manual_seed(0)
    layers = nn.ModuleDict({"features": make_layers(cfgs["D"])})
    torch.save(layers.state_dict(), path)
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    """Ten pictures of several sizes in two folders."""
    rng, sources = np.random.default_rng(0), [data.astronaut(), data.chelsea(), data.coffee()]
    for i in range(IMAGES):
        height, width = rng.integers(60, 200, size=2)
        picture = Image.fromarray(sources[i % 3][40 * i % 90 :][:height, 15 * i :][:, :width])
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return tmp_path / "photos"


@pytest.fixture
def model(visual_tokenizer, tmp_path) -> Path:
    visual_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def command(model, photos, inception_weights, vgg_weights, tmp_path):
    """A command line for everything, with Inception's cheapest layer and no worker processes."""

    def make(output: str, *more: str) -> list[str]:
        paths = {"--model": model, "--images": photos, "--output": tmp_path / output}
        paths |= {"--inception_weights": inception_weights, "--vgg_weights": vgg_weights}
        options = [str(part) for pair in paths.items() for part in pair]
        return [*options, "--inception_layer", "64", "--workers", "0", "--device", "cpu", *more]

    return make


def run(arguments: list[str]) -> dict:
    """The report of a run."""
    evaluation.main(arguments)
    return json.loads(Path(arguments[arguments.index("--output") + 1]).read_text(encoding="utf-8"))


def run_in_this_process_of_several(arguments: list[str]) -> None:
    PartialState._reset_state()  # what the parent process left
    torch.set_num_threads(1)
    evaluation.main(arguments)


def fidelity(folder: Path, weights: Path, layer: str) -> float:
    """torch-fidelity's own number of the saved pictures."""
    return torch_fidelity.calculate_metrics(
        input1=f"{folder}/originals",
        input2=f"{folder}/reconstructions",
        samples_find_deep=True,
        fid=True,
        feature_layer_fid=layer,
        feature_extractor_weights_path=str(weights),
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )["frechet_inception_distance"]


def assert_same(metrics: dict, expected: dict) -> None:
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4), name


def test_numbers_are_those_of_the_libraries_whatever_the_batch(
    command, model, photos, inception_weights, vgg_weights, tmp_path, capsys
):
    saved = tmp_path / "saved"
    report = run(command("7.json", "--batch_size", "7", "--save_images", str(saved)))
    metrics = report["metrics"]
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    pairs = [
        [np.asarray(Image.open(saved / kind / f"{name}.png")) for kind in ("originals", "reconstructions")]
        for name in names
    ]
    assert report["images"] == len(names) == IMAGES and pairs[0][0].shape == (SIDE, SIDE, 3)

    distance = fidelity(saved, inception_weights, "64")
    assert distance > 0.1 and metrics["frechet_distance_inception_64"] == pytest.approx(distance, rel=1e-4)
    assert metrics["psnr_db"] == pytest.approx(np.mean([peak_signal_noise_ratio(a, b) for a, b in pairs]))
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
    assert metrics["ssim"] == pytest.approx(np.mean([structural_similarity(a, b, **wang) for a, b in pairs]))
    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    state = torch.load(vgg_weights, weights_only=True)
    network.net.load_state_dict(
        {name: state[f"features.{name.split('.', 1)[1]}"] for name in network.net.state_dict()}
    )
    a, b = (torch.tensor(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1 for images in zip(*pairs))
    assert metrics["lpips_vgg"] == pytest.approx(network(a, b).mean().item(), rel=1e-4)

    processor = UniTokImageProcessorPil(mode="reconstruct", size={"height": SIDE, "width": SIDE})
    pixels = processor([Image.open(photos / name) for name in names])["pixel_values"]
    tokenizer = UniTokModel.from_pretrained(model)
    codes = tokenizer.encode(pixels)
    for originals, reconstructions, *pictures in zip(
        processor.post_process(pixels), processor.post_process(tokenizer.decode(codes)), *zip(*pairs)
    ):
        assert np.array_equal(originals, pictures[0]) and np.array_equal(reconstructions, pictures[1])
    assert metrics["codebook_usage_percent_each"] == [100 * len(codes[:, k].unique()) / 32 for k in range(4)]

    del metrics["lpips_vgg"]
    for size in ("1", "64"):
        assert_same(run(command(f"{size}.json", "--batch_size", size, "--skip", "lpips"))["metrics"], metrics)
    with Image.open(tmp_path / "7.png") as sheet:
        assert sheet.width > 2 * sheet.height
    assert "Fréchet distance, Inception's 64" in capsys.readouterr().out
    assert report["notes"] == [
        "frechet_distance_inception_64 is of 10 images with 64 features: more images give another"
    ]


def test_two_processes_and_a_broken_image_in_between_give_the_same(command, photos, tmp_path, monkeypatch, capsys):
    expected = run(command("one.json", "--skip", "lpips"))
    good = (photos / "a/4.png").read_bytes()
    (photos / "a/4.png").write_bytes(good[:200])
    arguments = command("two.json", "--batch_size", "2", "--skip", "lpips")
    with pytest.raises(
        SystemExit, match="error: 1 of 10 images are broken, at most 1.00% may be: a/4.png: cannot read .* kept"
    ):
        run(arguments)
    assert not (tmp_path / "two.json").exists() and "skipping a/4.png: cannot read" in capsys.readouterr().err

    (photos / "a/4.png").write_bytes(good)
    (photos / "b/1.png").write_bytes((photos / "b/1.png").read_bytes() + b" ")  # measured already: begins anew
    with monkeypatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        debug_launcher(run_in_this_process_of_several, (arguments,), num_processes=2)
    report = json.loads((tmp_path / "two.json").read_text(encoding="utf-8"))
    assert (report["processes"], report["images"]) == (2, IMAGES)
    assert_same(report["metrics"], expected["metrics"])
    assert not (tmp_path / "two.json.parts").exists()


def test_what_is_measured_is_not_measured_again(command, photos, tmp_path, monkeypatch, capsys):
    measured = []
    reconstruct = evaluation.Evaluation.reconstruct

    def counted(self, batch):
        measured.append(len(batch.indices))
        if sum(measured) > 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return reconstruct(self, batch)

    arguments = command("out.json", "--batch_size", "3", "--skip", "lpips")
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Evaluation, "reconstruct", counted)
        with pytest.raises(SystemExit, match="Interrupted. .* the same command goes on") as end:
            run(arguments)
        assert end.value.code == 143
        measured.clear()
        first = run([*arguments, "--batch_size", "2"])
        assert measured == [2, 2]
        patch.setattr(evaluation, "load_system", None)
        assert run(arguments) == first
    assert capsys.readouterr().err.count("anew") == 0
    other = run([*arguments, "--limit", "4", "--skip", "rfid,lpips"])
    said = f"{tmp_path}/out.json was measured with other settings, images or versions: it is measured anew\n"
    assert said in capsys.readouterr().err
    assert (other["images"], other["key"] == first["key"]) == (4, False)
    assert_same(first["metrics"], run(command("whole.json", "--skip", "lpips"))["metrics"])


def test_broken_images_are_left_out_by_option_and_listed(command, photos, tmp_path, capsys):
    (photos / "a/0.png").write_bytes(b"")
    report = run(command("out.json", "--skip", "rfid,lpips", "--skip_broken", "--batch_size", "1"))
    assert (report["images"], report["broken"]) == (IMAGES - 1, ["a/0.png"])
    assert "1 broken images left out: a/0.png" in capsys.readouterr().out
    again = command("out.json", "--skip", "rfid,lpips", "--batch_size", "1")
    assert run([*again, "--max_broken_share", "0.1"]) == report  # what is there is enough
    with pytest.raises(SystemExit, match="1 of 10 images are broken, at most 9.00% may be"):
        run([*again, "--max_broken_share", "0.09"])
    (photos / "a/0.png").unlink()
    assert_same(run(command("rest.json", "--skip", "rfid,lpips"))["metrics"], report["metrics"])


def test_identical_images_are_at_no_distance():
    torch.manual_seed(0)
    features = torch.rand(10, 64)
    moments = second_moments(features)
    assert frechet_distance(moments, moments) == pytest.approx(0, abs=1e-5)
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    assert psnr_of_uint8(images, images).tolist() == [MOST_PSNR] * 2
    assert ssim(images, images).tolist() == pytest.approx([1, 1])


def test_moments_of_parts_are_those_of_the_whole_and_the_distance_is_that_of_gaussians():
    torch.manual_seed(0)
    features = torch.randn(500, 3).double() * torch.tensor([1.0, 2.0, 3.0]) + 100
    parts = [second_moments(part) for part in features.split(77)]
    whole, shifted = second_moments(features), second_moments(2 * features + 1)
    assert torch.allclose(sum(parts), whole, rtol=1e-12)
    mean = features.mean(dim=0)
    expected = (mean + 1).square().sum() + features.var(dim=0).sum()  # of the covariances S and 4 S: trace S
    assert frechet_distance(sum(parts), shifted) == pytest.approx(expected.item(), rel=1e-9)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        frechet_distance(second_moments(features[:1]), whole)


def test_psnr_of_known_errors_and_codes_counted_by_hand():
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    assert psnr_of_uint8(images + torch.tensor([5, 255]).byte().view(2, 1, 1, 1), images).tolist() == pytest.approx(
        [20 * math.log10(255 / 5), 0]
    )
    assert code_statistics(torch.tensor([[2, 2, 4, 0], [8, 0, 0, 0]])) == {
        "codebook_usage_percent": 50.0,
        "codebook_usage_percent_each": [75.0, 25.0],
        "code_entropy_bits": 0.75,
        "code_entropy_bits_each": [1.5, 0.0],
        "code_entropy_bits_possible": 2.0,
    }


def test_levels_are_rounded_as_the_image_processor_does():
    pixels = torch.linspace(-1.1, 1.1, 3 * 16 * 16).view(1, 3, 16, 16)
    picture = UniTokImageProcessorPil().post_process(pixels)[0]
    assert np.array_equal(evaluation.to_uint8(pixels)[0].permute(1, 2, 0), picture)


def test_autoencoders_of_diffusers_are_scored_under_the_same_preprocessing(command, photos, tmp_path):
    import diffusers

    blocks = {"block_out_channels": (32, 32), "norm_num_groups": 8, "layers_per_block": 1}
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    kl = diffusers.AutoencoderKL(latent_channels=4, **blocks, **types).eval()
    vq = diffusers.VQModel(latent_channels=3, num_vq_embeddings=17, **blocks, **types).eval()
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    processor = UniTokImageProcessorPil(mode="reconstruct", size={"height": 32, "width": 32})
    names = sorted(photos.rglob("*.png"))
    pixels = processor([Image.open(name) for name in names])["pixel_values"]
    originals = evaluation.to_uint8(pixels)
    for name, system in (("pipeline/vae", kl), ("vq", vq), ("tiny", tiny)):
        system.save_pretrained(tmp_path / name)
        folder, _, subfolder = name.partition("/")
        options = ["--system", "diffusers", "--subfolder", subfolder, "--skip", "rfid,lpips", "--image_size", "32"]
        report = run([*command(f"{folder}.json", *options), "--model", str(tmp_path / folder)])
        assert report["system"] == type(system).__name__
        with torch.no_grad():
            decoded = system.decode(system.encode(pixels).latents) if system is tiny else system(pixels)
        expected = psnr_of_uint8(evaluation.to_uint8(decoded.sample), originals).mean().item()
        assert report["metrics"]["psnr_db"] == pytest.approx(expected, rel=1e-6)
        assert ("codebook_usage_percent" in report["metrics"]) == (system is vq)
        if system is vq:
            with torch.no_grad():
                *_, (_, _, codes) = vq.quantize(vq.encode(pixels).latents)
            assert report["metrics"]["codebook_usage_percent_each"] == [100 * len(codes.unique()) / 17]


def test_proxy_network_knows_its_classes_and_is_called_a_proxy(command, capsys):
    network = lite0()
    picture = torch.from_numpy(data.coffee()[:, 100:500]).permute(2, 0, 1)[None]
    pixels = nn.functional.interpolate(picture / 127.5 - 1, (224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        assert network(pixels).argmax().item() in (504, 967, 968)  # coffee mug, espresso, cup
        features = evaluation.lite0_features(torch.device("cpu"))(picture)
        assert torch.allclose(network.classifier(features), network(pixels), atol=1e-5)
    report = run(command("out.json", "--skip", "rfid,lpips,psnr,ssim,codes", "--proxy", "--limit", "3"))
    assert list(report["metrics"]) == ["proxy_fd_efficientnet_lite0"]
    assert 0 < report["metrics"]["proxy_fd_efficientnet_lite0"] < math.inf
    assert "proxy, not rFID" in capsys.readouterr().out


def test_missing_weights_are_named_with_what_to_do(command, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for proxy in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nothing listens there
    for option, weights, skip in (
        ("--inception_weights", "weights-inception-2015-12-05", "rfid"),
        ("--vgg_weights", "vgg16-397923af", "lpips"),
    ):
        with pytest.raises(SystemExit, match=rf"{weights}.*Give {option} FILE, or leave it out by --skip {skip}"):
            run(command("out.json", option, ""))
        with pytest.raises(SystemExit, match=f"there is no file nowhere.pth \\({option}\\)"):
            run(command("out.json", option, "nowhere.pth"))
    monkeypatch.setattr(evaluation.EvalImages, "__getitem__", None)  # no image is read before
    both = r"rfid needs .*weights-inception.* by --skip rfid\. lpips needs .*vgg16.* by --skip lpips\.$"
    with pytest.raises(SystemExit, match=both):
        run(command("out.json", "--inception_weights", "", "--vgg_weights", ""))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(SystemExit, match="rfid needs .*other.pth.*Missing key.*Give --inception_weights FILE"):
        run(command("out.json", "--inception_weights", str(tmp_path / "other.pth")))


def test_center_crop_keeps_pixels_and_refuses_smaller_pictures(command, photos, tmp_path):
    saved = tmp_path / "saved"
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    options = ["--skip", "rfid,lpips", "--preprocessing", "center_crop", "--save_images", str(saved)]
    report = run(command("out.json", *options))
    for name in names:
        with Image.open(photos / name) as original, Image.open(saved / "originals" / f"{name}.png") as cropped:
            left, top = (round((side - SIDE) / 2) for side in original.size)
            assert np.array_equal(np.asarray(original)[top : top + SIDE, left : left + SIDE], cropped)
    assert {n["metric"]: n["value"] for n in report["numbers"]} == {
        "PSNR": report["metrics"]["psnr_db"],
        "SSIM": report["metrics"]["ssim"],
        "codes in use": report["metrics"]["codebook_usage_percent"],
    }
    assert report["numbers"][0]["protocol"] == {
        "split": "10 images",
        "prompt": None,
        "sampling": None,
        "images": "center_crop, 48x48",
        "reference": "the same images",
        "tool": "mean over 8-bit images",
    }
    other = run(command("some.json", "--skip", "rfid,lpips", "--limit", "4"))
    assert [n["protocol"]["split"] for n in other["numbers"]] == ["4 of 10 images"] * 3
    assert other["numbers"][0]["protocol"]["images"] == "reconstruct, 48x48"
    Image.open(photos / names[0]).crop((0, 0, 47, 60)).save(photos / names[0])
    with pytest.raises(SystemExit, match=r"a/0.png: 47x60 pixels, center_crop takes the 48x48 in the middle"):
        run(command("small.json", "--skip", "rfid,lpips", "--preprocessing", "center_crop"))


def test_results_of_other_versions_are_not_gone_on_with(command, monkeypatch):
    arguments = command("out.json", "--skip", "rfid,lpips", "--limit", "3")
    first = run(arguments)
    assert run(arguments) == first
    monkeypatch.setattr(evaluation, "all_versions", lambda: {"torch": "1.0"})
    assert run(arguments)["key"] != first["key"]


@pytest.mark.parametrize(
    "options, error",
    [
        (["--preprocessing", "resize"], "unknown preprocessing 'resize', expected reconstruct or center_crop"),
        (["--system", "vqgan"], "unknown system 'vqgan', expected unitok or diffusers"),
        (["--skip", "fid"], "cannot skip fid; the metrics are rfid, psnr, ssim, lpips, codes"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--model", "nowhere"], "no model in nowhere: it has no config.json"),
        (["--images", "nowhere"], "there is no folder nowhere"),
        (["--image_size", "40"], "image_size must be a multiple of 16, got 40"),
        (["--limit", "1"], "has 1: --skip rfid"),
        (
            ["--system", "diffusers", "--model", TINY, "--skip", "rfid,lpips"],
            "tiny is a unitok_mllm model, not an autoencoder of diffusers",
        ),
        (
            ["--inception_weights", __file__, "--skip", "lpips"],
            "rfid needs Inception's weights .*test_reconstruction.py.*: .* Give --inc",
        ),
    ],
)
def test_mistakes_are_told(command, options, error):
    with pytest.raises(SystemExit, match=error):
        run(command("out.json", *options))


def test_an_empty_folder_is_an_error(command, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="error: .*empty has no images"):
        run(command("out.json", "--images", str(tmp_path / "empty")))


@pytest.mark.slow
def test_rfid_of_two_torchrun_processes_is_torch_fidelitys(command, inception_weights, tmp_path):
    saved = tmp_path / "saved"
    arguments = command("out.json", "--inception_layer", "2048", "--batch_size", "3", "--save_images", str(saved))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, "-m", "eval.reconstruction", *arguments], check=True, env=environment)
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert report["processes"] == 2
    assert report["metrics"]["rfid"] == pytest.approx(fidelity(saved, inception_weights, "2048"), rel=1e-4)

    shutil.rmtree(saved / "reconstructions")
    shutil.copytree(saved / "originals", saved / "reconstructions")
    pictures = [torch.tensor(np.asarray(Image.open(path))) for path in saved.rglob("originals/*/*.png")]
    extract = inception_features(str(inception_weights), "2048", torch.device("cpu"))
    features = extract(torch.stack(pictures).permute(0, 3, 1, 2))
    moments = second_moments(features)
    distances = frechet_distance(moments, moments), fidelity(saved, inception_weights, "2048")
    assert distances == pytest.approx((0, 0), abs=1e-5 * features.var(dim=0).sum().item())
