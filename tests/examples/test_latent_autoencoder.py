"""The autoencoder for latent diffusion: both losses train alike; what the discriminator adds. test_latent_losses.py has
the losses themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from on_examples import interrupt_in_step, one_thread, read_csv  # noqa: F401

# isort: split
import latent_autoencoder
from common.adversarial import AdversarialTrainer, adaptive_weight, centred
from common.data import load
from common.latent_models import FeatureDistance, LatentAutoencoder, PatchDiscriminator
from common.loss_cost import LossPart
from common.sprites import sprites
from common.sweep import load_finished
from torch import Tensor, nn

FILES = ["curves.csv", "latent_autoencoder.png", "models", "results.csv"]
PERCEPTUAL, BETA = 0.5, 1.5
EPOCHS = 6  # of 20 steps; the discriminator begins with the third
TINY = ["--width", "8", "--epochs", str(EPOCHS), "--device", "cpu"]
Make = Callable[..., AdversarialTrainer]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "sprites.npz"
    np.savez(path, images=sprites(400, 16).numpy())
    return str(path)


@pytest.fixture(scope="module")
def quick(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latent")
    assert latent_autoencoder.main(["--quick", *TINY, "--data", data, "--out", str(out)]) == 0
    return out


@pytest.fixture
def make(data: str, tmp_path: Path) -> Make:
    """The trainer of one loss, as the script makes it."""

    def trainer(kind: str, *options: str) -> AdversarialTrainer:
        args = latent_autoencoder.parse_args([*TINY, "--data", data, *options])
        run = latent_autoencoder.make_run(args, load(data), kind)
        return run.build(tmp_path / "checkpoint.pt", run.settings)

    return trainer


@pytest.mark.parametrize("kind", latent_autoencoder.STYLES)
def test_the_gradients_are_those_of_the_adaptive_weight_s_formula(kind: str, make: Make) -> None:
    trainer = make(kind, "--gan", "0.7")
    objective, discriminator = trainer.objective.train(), trainer.discriminator
    trainer.epoch = trainer.gan_start
    x = trainer.batch(trainer.images.train[:8])

    torch.manual_seed(1)
    elbo, recon = objective.elbo(x)
    adversarial = -discriminator(recon).mean()
    last, parameters = objective.model.last.weight, list(objective.model.parameters())

    def of(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True))

    at_last = [of(part)[[p is last for p in parameters].index(True)] for part in (elbo.distortion, adversarial)]
    ratio = at_last[0].square().sum().sqrt() / (at_last[1].square().sum().sqrt() + 1e-4)
    torch.testing.assert_close(adaptive_weight(elbo.distortion, adversarial, last), ratio, rtol=1e-5, atol=0)
    expected = [a + 0.7 * ratio * b for a, b in zip(of(elbo.loss), of(adversarial), strict=True)]

    torch.manual_seed(1)
    before = [p.clone() for p in discriminator.parameters()]
    trainer.optimizer.zero_grad()
    trainer.gradients(x)
    found = torch.cat([p.grad.flatten() for p in parameters])
    wanted = torch.cat([gradient.flatten() for gradient in expected])
    # Of the whole: a bias before a normalisation has the gradient 0, and what is found there is rounding.
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    assert not all(map(torch.equal, before, discriminator.parameters()))  # it has learnt, from its own loss


def test_the_discriminator_waits_for_its_epoch(make: Make) -> None:
    trainer = make("ours")
    before = [p.clone() for p in trainer.discriminator.parameters()]
    trainer.train_step(torch.arange(8))
    assert all(map(torch.equal, before, trainer.discriminator.parameters()))


def test_a_discriminator_learns_to_tell(make: Make) -> None:
    trainer = make("ours")
    real = centred(trainer.batch(trainer.images.train[:32]))
    blurred = nn.functional.avg_pool2d(real, 5, stride=1, padding=2)
    for _ in range(60):
        trainer.discriminate(real, blurred)
    with torch.no_grad():
        assert trainer.discriminator(real).mean() > trainer.discriminator(blurred).mean() + 1


def test_the_average_is_evaluated_in_place_of_the_weights(make: Make) -> None:
    trainer = make("ours", "--ema", "0.75")
    expected = None
    for step in range(3):
        trainer.train_step(torch.arange(8 * step, 8 * step + 8))
        now = trainer.objective.model.last.weight.detach().clone()
        expected = now if expected is None else 0.75 * expected + 0.25 * now
    torch.testing.assert_close(trainer.model.last.weight, expected, rtol=1e-5, atol=1e-7)
    averaged = trainer.evaluate(trainer.images.val)
    assert trainer.objective.model.last.weight.equal(now)  # put back
    trainer.average = None
    trained = trainer.evaluate(trainer.images.val)
    assert all(trained[key] != averaged[key] for key in ("distortion", "rate", "mae"))


def test_what_a_quick_run_leaves(quick: Path) -> None:
    assert sorted(path.name for path in quick.iterdir()) == FILES
    rows, curves = read_csv(quick / "results.csv"), read_csv(quick / "curves.csv")
    assert [row["kind"] for row in rows] == ["ours", "theirs"]
    assert len(curves) == 2 * EPOCHS
    for row in rows:
        assert row["loss"] == pytest.approx(row["distortion"] + row["beta"] * row["rate"], rel=1e-5)
        assert row["psnr"] == pytest.approx(10 * math.log10(4 / row["mse"]))
    assert curves[EPOCHS - 1]["mae"] < 0.9 * curves[0]["mae"]
    assert curves[EPOCHS - 1]["train_sigma"] < 0.9 * curves[0]["train_sigma"]


def test_training_is_equal(quick: Path) -> None:
    """Within what the rounding of fp32 becomes over 120 steps of Adam, 80 of them against a discriminator."""
    curves = read_csv(quick / "curves.csv")
    for ours, theirs in zip(curves[:EPOCHS], curves[EPOCHS:], strict=True):
        for key in ("loss", "distortion", "rate", "sigma", "train_sigma", "mae"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-3), key


@pytest.fixture
def fp64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("fp64")
def test_training_is_equal_to_rounding(make: Make) -> None:
    """The same in fp64: what grows in fp32 is rounding, and no difference of the losses."""
    trainers = [make(kind) for kind in ("ours", "theirs")]
    for trainer in trainers:
        torch.manual_seed(0)
        trainer.fit()
    for ours, theirs in zip(*(trainer.history for trainer in trainers), strict=True):
        assert ours["train"] == pytest.approx(theirs["train"], rel=1e-9)
    # Of what the models do, not of their weights: Adam makes steps out of gradients that are nothing but rounding.
    recons = [trainer.reconstruct(trainer.batch(trainer.images.val)) for trainer in trainers]
    torch.testing.assert_close(*recons, rtol=0, atol=1e-8)


def test_the_numbers_are_those_of_the_kept_model(quick: Path, data: str) -> None:
    args = latent_autoencoder.parse_args(["--quick", *TINY, "--data", data])
    images = load(data)
    trainer = load_finished(latent_autoencoder.make_run(args, images, "ours"), quick)
    x = images.test.float() / 127.5 - 1
    with torch.no_grad():
        error = trainer.model.decode(trainer.model.encode(x)[0]).clamp(-1, 1) - x
    assert read_csv(quick / "results.csv")[0]["mae"] == pytest.approx(error.abs().mean().item(), rel=1e-5)


def test_ours_keeps_nothing_for_backward_but_its_inputs(quick: Path) -> None:
    ours, theirs = read_csv(quick / "results.csv")
    batch = 4 * 3 * 256 * 256 * 4 / 2**20
    assert ours["loss_mib"] < 0.01
    assert theirs["loss_mib"] >= batch  # the error, at least
    for kind in ("ours", "theirs"):
        part = LossPart(latent_autoencoder.make_loss(kind, PERCEPTUAL, BETA), 4, torch.device("cpu"), bf16=False)
        part.seconds()
        assert all(t.grad is not None and t.grad.isfinite().all() for t in part.inputs if t.requires_grad)


def test_bf16_autocast(make: Make) -> None:
    """The networks compute in bf16, our loss in fp32 from what they give."""
    found = {}
    for precision in ("fp32", "bf16"):
        trainer = make("ours", "--precision", precision)
        dtypes: list[torch.dtype] = []
        trainer.objective.model.decoder.register_forward_hook(lambda *a, seen=dtypes: seen.append(a[2].dtype))
        trainer.epoch = trainer.gan_start
        torch.manual_seed(0)
        found[precision] = trainer.train_step(torch.arange(8))
        assert dtypes == [torch.bfloat16 if precision == "bf16" else torch.float32]
    assert all(t.dtype == torch.float32 for t in found["bf16"])
    assert found["bf16"].loss.item() == pytest.approx(found["fp32"].loss.item(), rel=0.02)


def test_resumed_run_equals_uninterrupted_one(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--data", data, "--width", "4", "--epochs", "3", "--ema", "0.9", "--device", "cpu"]
    options += ["--loss", "ours", "learned"]
    assert latent_autoencoder.main([*options, "--out", str(tmp_path / "whole")]) == 0
    for i, step in enumerate((45, 65)):  # of 2 models with 60 each, both in their last epoch
        with monkeypatch.context() as patch:
            interrupt_in_step(patch, step)
            resume = ["--resume"] * (i > 0)
            assert latent_autoencoder.main([*options, "--out", str(tmp_path / "cut"), *resume]) == 130
    assert latent_autoencoder.main([*options, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    timed = dict.fromkeys(("seconds", "loss_ms"), 0)
    whole, cut = ([r | timed for r in read_csv(tmp_path / run / "results.csv")] for run in ("whole", "cut"))
    assert whole == cut
    assert (tmp_path / "whole" / "curves.csv").read_text() == (tmp_path / "cut" / "curves.csv").read_text()


def test_the_feature_distance_is_fixed_and_zero_for_equal_images() -> None:
    torch.manual_seed(5)
    distance = FeatureDistance(3)
    state = torch.get_rng_state()
    other = FeatureDistance(3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, distance.parameters(), other.parameters()))
    x = (sprites(4) / 127.5 - 1).requires_grad_()
    p = distance(x, x.detach())
    assert p.shape == (4,)
    assert p.eq(0).all()
    assert torch.autograd.grad(p.sum(), x)[0].isfinite().all()
    blurred = nn.functional.avg_pool2d(x, 3, stride=1, padding=1)
    assert (distance(x, blurred) > distance(x, 0.9 * x)).all()


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 9, 10)])
def test_images_of_any_size(shape: tuple[int, int, int]) -> None:
    x = torch.rand(2, *shape)
    recon, mu, _ = LatentAutoencoder(shape, 4, 8)(x)
    assert recon.shape == x.shape
    assert mu.shape == (2, 4, *(math.ceil(n / 4) for n in shape[1:]))
    assert PatchDiscriminator(shape[0])(recon).ndim == 4


def test_sprites_are_the_same_each_time_and_all_different() -> None:
    images = sprites(50)
    assert images.dtype == torch.uint8
    assert images.shape == (50, 3, 32, 32)
    assert torch.equal(images, sprites(50))
    assert len(images.flatten(1).unique(dim=0)) == 50
    assert images.float().std((2, 3)).min() > 5  # none is blank


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "--epochs: must be at least 1, got 0"),
        (["--gan", "-1"], "--gan: must be at least 0, got -1"),
        (["--ema", "1"], "--ema must be below 1, got 1"),
        (["--loss", "ours", "ours"], "--loss must differ, got ours ours"),
        (["--precision", "fp16"], "--precision: invalid choice: 'fp16'"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        latent_autoencoder.main(options)
    assert message in capsys.readouterr().err
