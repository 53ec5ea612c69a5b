from __future__ import annotations

import csv
import itertools
import warnings
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from attribution_runs import (
    SAMPLES_PER_SHARD,
    PartlyUsed,
    partly_used_module,
    ragged_fields,
    random_fisher,
    score,
    toy_data,
    trainer,
    unlearn,
)
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from reference_attribution import Loss, Naive, toy_loss, unet_loss
from reference_attribution import score as naive_score
from torch import Tensor, nn
from toys import ToyDenoiser, ToyObjective, tiny_unet, toy_shards

from lightning_unlearn.data.shards import write_shards
from lightning_unlearn.diffusion.objective import DenoisingObjective, Objective
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import generator_for
from lightning_unlearn.fisher import DiagonalFisher
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.strategies import Newton
from lightning_unlearn.unlearning.guards import check_processes
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.delta_files import read_deltas
from lightning_unlearn.weights.deltas import DeltaStore, NetworkLoss
from lightning_unlearn.weights.parameters import layer_parameters
from lightning_unlearn.weights.precision import BACKENDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("module")
    write_shards(ragged_fields(range(7)), folder / "train", samples_per_shard=SAMPLES_PER_SHARD)
    toy_shards(folder / "queries", 2, 2, captions=2, prefix="query")
    return folder


def module(network: nn.Module | None = None, **settings: Any) -> UnlearningModule:
    network = network or ToyDenoiser()
    defaults: dict[str, Any] = {
        "objective": ToyObjective(),
        "fisher": random_fisher(network, "all"),
        "parameters": "all",
        "strategy": Newton(alpha=1.0, N=20),
        "views": Views(2, noise="per_sample"),
    }
    return UnlearningModule(network, **{**defaults, **settings})


def deltas_of(found: UnlearningModule) -> dict[str, Tensor]:
    assert found.deltas is not None
    return {name: delta.detach().clone() for name, delta in found.deltas.named().items()}


def unlearned(folder: Path, found: UnlearningModule | None = None, **data: Any) -> dict[str, Tensor]:
    found = found or module()
    unlearn(found, toy_data(folder, **{"draws": 12, **data}))
    return deltas_of(found)


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------------------------- predict is the plain loop


def naive_losses(
    network: nn.Module, by_hand: Loss, objective: Objective, views: Views, folder: Path, deltas: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Each sample's losses ``(1 + Q, flips, captions, draws)``, one view at a time."""
    naive = Naive(network, list(deltas))
    data = toy_data(folder)
    data.setup("predict")
    timesteps = views.draw_timesteps(objective.num_timesteps).tolist()
    found = {}
    for batch in data.predict_dataloader():
        for row, key in enumerate(batch.keys):
            count = min(int(batch.caption_counts[row]), views.captions or 99)
            losses = torch.full((3, 1 + views.flips, count, views.draws), torch.nan, dtype=torch.float64)
            places = itertools.product(range(3), range(1 + views.flips), range(count), range(views.draws))
            for weights, flip, caption, draw in places:
                latents = batch.latents_flip if flip else batch.latents
                assert latents is not None
                noise = views.draw_noise([key], latents.shape[1:], flip, caption, draw)[0].double()
                latent, text = latents[row].double(), batch.text[row, caption].double()
                delta = {name: value[weights - 1] for name, value in deltas.items()} if weights else None
                losses[weights, flip, caption, draw] = naive.value(
                    delta,
                    lambda net, a=latent, b=text, t=timesteps[draw], n=noise: by_hand(net, a, b, t, n),  # type: ignore[misc]
                )
            found[key] = losses
    return found


def random_deltas(found: UnlearningModule, size: float) -> dict[str, Tensor]:
    found.deltas = DeltaStore(layer_parameters(found.layers), ["query-00000", "query-00001"])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for delta in found.deltas.parameters():
            delta.copy_(size * torch.randn(delta.shape, generator=generator, dtype=torch.float64))
    return deltas_of(found)


@pytest.mark.parametrize(
    ("name", "views"),
    [
        ("toy", Views(2, noises=2, noise="per_sample", flips=True)),
        ("toy", Views(3, (0.2, 0.8), captions=2)),
        ("epsilon", Views(1, noise="per_sample", flips=True)),
        ("v_prediction", Views(1, noise="shared", captions=1)),
        ("sample", Views(2, noise="per_sample", captions=2)),
    ],
)
def test_deviations_and_scores_are_those_of_the_plain_loop(
    name: Any, views: Views, folder: Path, tmp_path: Path
) -> None:
    network = (ToyDenoiser() if name == "toy" else tiny_unet()).double()
    objective = ToyObjective() if name == "toy" else DenoisingObjective({}, name)
    by_hand = toy_loss if name == "toy" else unet_loss(name)
    found = UnlearningModule(network, objective, parameters="all" if name == "toy" else "text_kv", views=views)
    deltas = random_deltas(found, 0.01 if name == "toy" else 0.3)
    expected = naive_losses(network, by_hand, objective, views, folder, deltas)

    (*outputs,) = trainer(tmp_path).predict(found, toy_data(folder)) or []
    seen = 0
    for output in outputs:
        assert output.base.dtype == torch.float64
        for row, key in enumerate(output.batch.keys):
            captions = expected[key].shape[2]
            base, after = output.base[row, :, :captions], output.unlearned[:, row, :, :captions]
            torch.testing.assert_close(base, expected[key][0], rtol=1e-6, atol=0)
            deviations = expected[key][1:] - expected[key][:1]
            torch.testing.assert_close(after - base, deviations, rtol=1e-6, atol=1e-6 * float(deviations.abs().mean()))
            assert output.base[row, :, captions:].isnan().all()
            assert output.unlearned[:, row, :, captions:].isnan().all()
            seen += 1
    assert seen == len(expected) == 7

    for rule in ("difference", "ratio"):
        score(found, toy_data(folder), tmp_path / rule, None, writer={"rule": rule})
        table = read_scores(tmp_path / rule)
        for row, key in enumerate(table.keys):
            losses = expected[key]
            for query in range(2):
                wanted = naive_score(losses[0], losses[1 + query], losses.shape[2], rule)
                assert float(table.scores[row, query]) == pytest.approx(wanted, rel=1e-6, abs=1e-9)
            assert float(table.base_losses[row]) == pytest.approx(float(losses[0].mean()), rel=1e-6)


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight


def test_loss_under_other_weights_keeps_them_tied() -> None:
    def loss(network: Any, *_: Any) -> Tensor:
        return (network.first.weight + 10 * network.second.weight).sum()[None]

    other: Any = torch.ones(2, 2)
    nothing: Any = None
    found = NetworkLoss(Tied(), cast(Any, loss)).under({"first.weight": other}, nothing, nothing, nothing)
    assert float(found) == 44


def test_precision_64_true_sees_the_same_draws_as_a_network_in_float64(folder: Path, tmp_path: Path) -> None:
    wide, by_trainer = module(ToyDenoiser().double()), module()
    by_trainer.fisher_source = wide.fisher_source
    unlearn(wide, toy_data(folder, draws=12))
    checkpoint = tmp_path / "deltas.ckpt"
    unlearn(by_trainer, toy_data(folder, draws=12), checkpoint, precision="64-true")
    for name, delta in deltas_of(wide).items():
        torch.testing.assert_close(
            deltas_of(by_trainer)[name], delta, rtol=0, atol=2e-6 * float(delta.abs().max())
        )  # the toy's own schedule is float32 in one
    score(wide, toy_data(folder), tmp_path / "wide", None)
    score(module(views=wide.views), toy_data(folder), tmp_path / "trainer", checkpoint, precision="64-true")
    wide_scores, scores = read_scores(tmp_path / "wide").scores, read_scores(tmp_path / "trainer").scores
    assert abs(wide_scores - scores).max() <= 1e-5 * wide_scores.std()


# ---------------------------------------------------------------------------------- what deltas depend on


def test_deltas_depend_on_the_seed_alone_and_not_on_the_global_random_state(folder: Path) -> None:
    torch.manual_seed(0)
    first = unlearned(folder)
    torch.manual_seed(1)
    torch.rand(3)
    assert_equal(first, unlearned(folder))
    other = unlearned(folder, module(seed=1))
    assert all(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("draw_batch_size", [1, 5, 12])
def test_deltas_do_not_depend_on_the_size_of_batches(folder: Path, draw_batch_size: int) -> None:
    first, other = unlearned(folder), unlearned(folder, draw_batch_size=draw_batch_size)
    for name, delta in first.items():
        assert float((delta - other[name]).norm()) <= 1e-5 * float(delta.norm())


def test_a_querys_delta_does_not_depend_on_the_other_queries(folder: Path) -> None:
    both, alone = unlearned(folder), unlearned(folder, query_keys=["query-00001"])
    for name, delta in both.items():
        assert alone[name].shape[0] == 1
        assert float((delta[1] - alone[name][0]).norm()) <= 1e-6 * float(delta[1].norm())


def test_a_modules_second_fit_starts_anew(folder: Path) -> None:
    found = module(strategy=Newton())
    first = unlearned(folder, found)
    assert_equal(first, unlearned(folder, found))
    second = unlearned(folder, found, query_keys=["query-00001"])
    assert found.targets == ["query-00001"]
    assert list(found.results) == ["query-00001"]
    for name, delta in second.items():
        assert float((delta[0] - first[name][1]).norm()) <= 1e-5 * float(delta.norm())


def test_layer_that_no_loss_depends_on_is_not_moved(folder: Path) -> None:
    deltas = unlearned(folder, partly_used_module(Newton()))
    assert not deltas["unused.weight"].any()
    assert deltas["text.weight"].any()


def test_layer_whose_fisher_is_zero_is_not_moved_and_named_in_a_warning(folder: Path) -> None:
    network = ToyDenoiser()
    fisher = random_fisher(network, "all")
    for name in ("text.weight", "text.bias"):
        fisher.sums[name].zero_()
    with pytest.warns(UserWarning, match="Fisher of layer text is all zero"):
        deltas = unlearned(folder, module(network, fisher=fisher, strategy=Newton()))
    assert not deltas["text.weight"].any()
    assert all(delta.isfinite().all() for delta in deltas.values())
    assert deltas["conv_in.weight"].any()


class Dropping(ToyDenoiser):
    """Drops half of what it sees while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return super().forward(self.dropout(noisy), timesteps, text)


def test_network_is_in_eval_mode_so_that_dropout_changes_nothing(folder: Path, tmp_path: Path) -> None:
    plain = module()
    assert_equal(unlearned(folder, plain), unlearned(folder, dropping := module(Dropping().train())))
    for name, found in (("plain", plain), ("dropping", dropping)):
        found.network.train()  # whatever someone does in between
        score(found, toy_data(folder), tmp_path / name, None)
    assert (read_scores(tmp_path / "plain").scores == read_scores(tmp_path / "dropping").scores).all()


def test_base_weights_are_the_same_bits_after_fit_and_predict(folder: Path, tmp_path: Path) -> None:
    found = module(strategy=Newton(2))
    before = {name: value.clone() for name, value in found.network.state_dict().items()}
    unlearned(folder, found)
    score(found, toy_data(folder), tmp_path / "out", None)
    assert_equal(before, dict(found.network.state_dict()))
    assert all(delta.any() for delta in deltas_of(found).values())


# ---------------------------------------------------------------------------------- the Trainer's settings


@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": 7},
        {"max_epochs": 1, "max_steps": 1},
        {"max_steps": 50},
        {"min_epochs": 5},
        {"accumulate_grad_batches": 3},
    ],
)
def test_trainer_takes_the_strategys_number_of_steps_whatever_it_is_told(
    folder: Path, settings: dict[str, Any]
) -> None:
    expected = unlearned(folder, module(strategy=Newton(2, alpha=1.0, N=20)))
    found = module(strategy=Newton(2, alpha=1.0, N=20))
    run = unlearn(found, toy_data(folder, draws=12), **settings)
    assert run.global_step == 2
    assert_equal(expected, deltas_of(found))


@pytest.mark.parametrize("settings", [{"limit_train_batches": 1}, {"fast_dev_run": True}, {"overfit_batches": 1}])
def test_trainer_that_leaves_draws_out_is_refused(folder: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="leaves draws out"):
        unlearn(module(), toy_data(folder), **settings)


class Impatient(Callback):
    """Somebody's own reason to end a fit, after its first batch or its first step."""

    def __init__(self, after: str) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop |= self.after == "batch" or trainer.global_step > 0


@pytest.mark.parametrize(
    ("settings", "callbacks", "says"),
    [
        ({"max_time": "00:01:00:00"}, [], "by max_time or a Timer"),
        ({}, [Timer("00:00:00:01")], "by max_time or a Timer"),
        ({}, [EarlyStopping("rise/query-00000")], "by EarlyStopping"),
        ({"limit_train_batches": 0}, [], "by limit_train_batches: 0"),
    ],
)
def test_trainer_that_may_end_the_unlearning_early_is_refused_before_it_starts(
    folder: Path, settings: dict[str, Any], callbacks: list[Callback], says: str
) -> None:
    found = module()
    with pytest.raises(InputError, match=says):
        trainer(folder, *callbacks, **settings).fit(found, toy_data(folder, draws=12))
    assert found.deltas is None


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_processes_that_end_with_fit_are_refused(folder: Path, strategy: str) -> None:
    with pytest.raises(InputError, match="forks or spawns processes that end with fit, and their deltas with them"):
        check_processes(trainer(folder, strategy=strategy, devices=2))


@pytest.mark.parametrize(("after", "steps"), [("batch", 0), ("step", 1)])
def test_fit_that_something_stopped_is_refused_and_its_deltas_score_nothing(
    folder: Path, tmp_path: Path, after: str, steps: int
) -> None:
    found, kept = module(strategy=Newton(2, alpha=1.0, N=20)), tmp_path / "cut.ckpt"
    run = trainer(folder, Impatient(after))
    with pytest.raises(InputError, match=f"stopped after {steps} of 2 steps"):
        run.fit(found, toy_data(folder, draws=12, draw_batch_size=4))
    with pytest.raises(InputError, match="did not end"):
        score(found, toy_data(folder), tmp_path / "out", None)
    run.save_checkpoint(kept)
    with pytest.raises(InputError, match=r"cut\.ckpt is of an unlearning that did not end"):
        read_deltas(str(kept))
    assert not read_deltas(str(kept), finished=False)["finished"]
    with pytest.raises(InputError, match="did not end"):
        score(module(), toy_data(folder), tmp_path / "out", kept)
    assert not (tmp_path / "out" / "run.json").exists()


def test_fit_that_goes_on_from_a_cut_checkpoint_ends_as_if_nothing_had_happened(folder: Path, tmp_path: Path) -> None:
    expected = unlearned(folder, module(strategy=Newton(2, alpha=1.0, N=20)))
    keep = ModelCheckpoint(tmp_path, "cut", save_on_train_epoch_end=True)
    with pytest.raises(InputError, match="stopped after 1 of 2"):
        trainer(folder, Impatient("step"), keep, enable_checkpointing=True).fit(
            module(strategy=Newton(2, alpha=1.0, N=20)), toy_data(folder, draws=12)
        )
    found = module(strategy=Newton(2, alpha=1.0, N=20))
    trainer(folder).fit(found, toy_data(folder, draws=12), ckpt_path=str(tmp_path / "cut.ckpt"))
    assert_equal(expected, deltas_of(found))
    score(found, toy_data(folder), tmp_path / "out", None)


def scaling() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"gradient_clip_val": 1.0}, "clips gradients"),
        ({"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}, "clips gradients"),
        ({"plugins": scaling}, "16-mixed"),
        ({"precision": "bf16-mixed"}, "bf16-mixed"),
        ({"precision": "bf16-true"}, "bf16-true"),
        ({"precision": "16-true"}, "16-true"),
    ],
)
def test_trainer_that_would_spoil_the_step_is_refused(folder: Path, settings: dict[str, Any], says: str) -> None:
    built = {name: value() if callable(value) else value for name, value in settings.items()}
    with pytest.raises(InputError, match=says):
        unlearn(module(), toy_data(folder), **built)


def test_network_in_float16_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"conv_in\.weight is torch\.float16, in which gradients vanish"):
        unlearn(module(ToyDenoiser().half()), toy_data(folder))
    found = module(ToyDenoiser().half())
    random_deltas(found, 0.1)
    with pytest.raises(InputError, match="in which gradients vanish"):
        score(found, toy_data(folder), tmp_path / "out", None)


def test_trainer_that_was_used_is_refused(folder: Path) -> None:
    run = unlearn(module(), toy_data(folder, draws=12))
    with pytest.raises(InputError, match="has run fit before"):
        run.fit(module(), toy_data(folder, draws=12))


def test_tf32_is_off_while_it_runs_and_given_back(folder: Path) -> None:
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seen.extend(attrgetter(name)(torch.backends).fp32_precision for name in BACKENDS)

    before = torch.get_float32_matmul_precision()
    # What Lightning tells people with Tensor Cores to set; on a CPU it means bfloat16.
    torch.set_float32_matmul_precision("medium")
    lower = [attrgetter(name)(torch.backends).fp32_precision for name in BACKENDS]
    try:
        trainer(folder, Look()).fit(module(), toy_data(folder, draws=12))
        assert [attrgetter(name)(torch.backends).fp32_precision for name in BACKENDS] == lower
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"ieee"}
    assert "bf16" in lower


def test_tf32_set_in_the_new_way_is_off_while_it_runs(folder: Path) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        trainer(folder).fit(module(), toy_data(folder, draws=12))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_settings_that_leave_no_trace_in_the_weights_are_in_the_fingerprint() -> None:
    one, other = tiny_unet(attention_head_dim=2), tiny_unet(attention_head_dim=4)
    other.load_state_dict(one.state_dict())
    marks = [UnlearningModule(network, DenoisingObjective()).weights_fingerprint() for network in (one, other)]
    assert marks[0] != marks[1]


def test_deltas_of_another_objective_are_refused(folder: Path, tmp_path: Path) -> None:
    class Other(ToyObjective):
        num_timesteps = 9

        def __init__(self) -> None:
            self.scale = 2.0

    run = unlearn(module(), toy_data(folder, draws=12))
    run.save_checkpoint(tmp_path / "deltas.ckpt", weights_only=False)
    found = module()
    found.loss.objective = Other()
    with pytest.raises(InputError, match="made with another objective"):
        trainer(folder).predict(found, toy_data(folder), ckpt_path=tmp_path / "deltas.ckpt")


def test_what_happened_to_each_query_is_logged(folder: Path, tmp_path: Path) -> None:
    found = module(strategy=Newton(2, 0.1))
    logger = CSVLogger(tmp_path, "log", version=0)
    unlearn(found, toy_data(folder, draws=12), logger=logger, log_every_n_steps=1)
    logger.save()
    rows = list(csv.DictReader((tmp_path / "log" / "version_0" / "metrics.csv").read_text().splitlines()))
    for query in ("query-00000", "query-00001"):
        rises = [float(row[f"rise/{query}"]) for row in rows if row.get(f"rise/{query}")]
        assert rises == pytest.approx([0.05, 0.1], rel=1e-4)
        last = [row for row in rows if row.get(f"rise/{query}")][-1]
        before, after = float(last[f"loss_before/{query}"]), float(last[f"loss_after/{query}"])
        assert after == pytest.approx(1.1 * before, rel=1e-4)
        assert float(last[f"penalty/{query}"]) == pytest.approx(found.results[query]["penalty"], rel=1e-5)


def test_penalty_is_half_the_quadratic_form_of_the_damped_fisher(folder: Path) -> None:
    found = module(ToyDenoiser().double(), damping=0.5)
    deltas = unlearned(folder, found)
    fisher = found.fisher_source
    assert isinstance(fisher, DiagonalFisher)
    for target, result in enumerate(found.results.values()):
        penalty = 0.0
        for layer in ("conv_in", "text", "conv_out"):
            means = {name: fisher.sums[name] / fisher.count for name in (f"{layer}.weight", f"{layer}.bias")}
            mean = float(torch.cat([value.flatten() for value in means.values()]).mean())
            penalty += sum(float(((means[name] + 0.5 * mean) * deltas[name][target] ** 2).sum()) for name in means)
        assert result["penalty"] == pytest.approx(penalty / 2, rel=1e-9)


# ---------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    unlearn(module(strategy=Newton()), toy_data(folder, draws=12), folder / "deltas.ckpt")
    return folder / "deltas.ckpt"


def test_checkpoint_holds_the_deltas_and_no_network_and_loads_without_pickle(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    names = {f"deltas.{name.replace('.', '/')}" for name, _ in ToyDenoiser().named_parameters()}
    assert set(content["state_dict"]) == names
    assert all(value.shape[0] == 2 for value in content["state_dict"].values())
    about = content["unlearning"]
    assert about["targets"] == ["query-00000", "query-00001"]
    assert about["results"]["query-00000"]["rise"] == pytest.approx(0.5, rel=1e-4)
    assert about["settings"]["damping"] == 0.001
    assert about["settings"]["toward_data"] == 0.5
    assert set(about["fingerprints"]) == {"weights", "fisher", "unlearning"}
    assert "hyper_parameters" not in content  # LightningCLI would let them override the command line


def test_predict_from_a_checkpoint_in_a_fresh_module_gives_the_same_bits(
    checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    found = module(strategy=Newton())
    unlearned(folder, found)
    score(found, toy_data(folder), tmp_path / "same process", None)
    fresh = module(fisher=None, strategy=Newton(alpha=3.0, N=2), damping=7.0, seed=9)
    score(fresh, toy_data(folder), tmp_path / "fresh", checkpoint)
    one, two = read_scores(tmp_path / "same process"), read_scores(tmp_path / "fresh")
    assert (one.scores == two.scores).all()
    assert one.run["fingerprints"] == two.run["fingerprints"]
    assert one.run["targets"] == two.run["targets"]
    assert two.run["unlearning"]["damping"] == 0.001  # of the deltas, not of the module that scores


def test_settings_in_a_checkpoint_do_not_override_the_modules(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    fresh = module(views=Views(5, seed=3), rise_draws=3)
    score(fresh, toy_data(folder), tmp_path / "out", checkpoint)
    assert fresh.views == Views(5, seed=3)
    assert fresh.rise_draws == 3
    assert read_scores(tmp_path / "out").run["views"] == Views(5, seed=3).settings()


def test_deltas_of_other_weights_are_refused(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="made for other weights"):
        score(module(ToyDenoiser(seed=1)), toy_data(folder), tmp_path / "out", checkpoint)


def test_deltas_of_other_layers_are_refused(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="of other layers than the chosen ones"):
        score(module(parameters=["text"]), toy_data(folder), tmp_path / "out", checkpoint)


def test_checkpoint_without_deltas_is_refused(folder: Path, tmp_path: Path) -> None:
    from lightning.pytorch import LightningModule

    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

        def training_step(self, batch: Any) -> Tensor:
            return self.layer(batch).sum()

    run = trainer(tmp_path, max_epochs=1)
    run.fit(Plain(), torch.utils.data.DataLoader(torch.ones(2, 1)))  # type: ignore[arg-type]
    run.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(InputError, match="holds no deltas; unlearn the queries first"):
        score(module(), toy_data(folder), tmp_path / "out", tmp_path / "plain.ckpt")


def test_predict_without_deltas_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no deltas to score with"):
        score(module(), toy_data(folder), tmp_path / "out", None)


def test_fit_that_is_stopped_and_goes_on_gives_the_same_deltas(folder: Path, tmp_path: Path) -> None:
    strategy = {"steps": 3, "target_increase": 0.2}
    whole = module(strategy=Newton(**strategy))
    keeper = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    run = trainer(tmp_path, keeper, enable_checkpointing=True)
    run.fit(whole, toy_data(folder, draws=12))
    found = module(strategy=Newton(**strategy))
    again = trainer(tmp_path)
    again.fit(found, toy_data(folder, draws=12), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert again.global_step == 3
    assert_equal(deltas_of(whole), deltas_of(found))
    assert whole.results == found.results
    assert whole.fingerprints() == found.fingerprints()


@pytest.mark.parametrize(
    ("settings", "data"),
    [
        ({"damping": 0.2}, {}),
        ({"seed": 1}, {}),
        ({"strategy": Newton(2)}, {}),
        ({}, {"draws": 13}),
        ({}, {"query_keys": ["query-00001", "query-00000"]}),
        ({"fisher": "other"}, {}),
    ],
)
def test_fit_does_not_go_on_from_deltas_made_in_another_way(
    checkpoint: Path, folder: Path, settings: dict[str, Any], data: dict[str, Any]
) -> None:
    if "fisher" in settings:
        fisher = random_fisher(ToyDenoiser(), "all")
        fisher.sums["text.bias"] *= 2
        settings = {"fisher": fisher}
    found = module(**{"strategy": Newton(), **settings})
    with pytest.raises(InputError, match="without ckpt_path"):
        trainer(folder).fit(found, toy_data(folder, **{"draws": 12, **data}), ckpt_path=checkpoint, weights_only=True)


# ---------------------------------------------------------------------------------- bad input


def test_fit_without_a_fisher_or_with_a_missing_file_is_an_error(folder: Path) -> None:
    with pytest.raises(InputError, match="needs a Fisher: train with FisherAccumulator"):
        unlearned(folder, module(fisher=None))
    with pytest.raises(InputError, match="no Fisher at /nowhere"):
        unlearned(folder, module(fisher="/nowhere/fisher.safetensors"))


def test_fisher_of_other_layers_is_an_error_that_names_one(folder: Path) -> None:
    with pytest.raises(InputError, match=r"another model or selection: layer conv_in is .* but it lacks it"):
        unlearned(folder, module(fisher=random_fisher(ToyDenoiser(), ["text"])))
    other = random_fisher(PartlyUsed(), "all")
    other.layers["text"] = type(other.layers["text"])("text", (5, 7), True)
    with pytest.raises(InputError, match=r"layer text is \(5, 6\) here, but it has \(5, 7\)"):
        unlearned(folder, module(fisher=other))


def test_fisher_of_more_layers_than_are_unlearned_will_do(folder: Path) -> None:
    deltas = unlearned(folder, module(fisher=random_fisher(ToyDenoiser(), "all"), parameters=["text"]))
    assert list(deltas) == ["text.weight", "text.bias"]


@pytest.mark.parametrize(("factor", "warned"), [(1.05, None), (1.5, "50%")])
def test_fisher_taken_far_from_the_weights_is_a_warning_with_the_distance(
    folder: Path, factor: float, warned: str | None
) -> None:
    network = ToyDenoiser()
    fisher = random_fisher(network, "all")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(factor)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        unlearned(folder, module(network, fisher=fisher))
    said = [str(warning.message) for warning in caught if "taken at" in str(warning.message)]
    assert len(said) == (warned is not None)
    assert warned is None or f"lie {warned} of their norm" in said[0]


class Bounded(ToyObjective):
    """Below 1, so that it can't rise tenfold."""

    def __call__(self, *arguments: Any) -> Tensor:
        return torch.tanh(super().__call__(*arguments))


def test_rise_that_cannot_be_reached_is_had_as_far_as_it_goes_with_a_warning(folder: Path) -> None:
    found = module(objective=Bounded(), strategy=Newton(target_increase=10.0))
    with pytest.warns(UserWarning, match=r"2 targets can't be raised .* \('query-00000': .* of 10, 'query-00001'"):
        unlearned(folder, found)
    for result in found.results.values():
        rise = result["loss_after"] / result["loss_before"] - 1
        assert 0.9 * (1 / result["loss_before"] - 1) < rise < 1 / result["loss_before"] - 1


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (Newton(), "mean loss of the samples is nan"),
        (Newton(target_increase=1.0), "loss of 'query-00000' has no finite gradient"),
        (Newton(alpha=1.0, N=20), "loss of 'query-00000' is nan"),
    ],
)
def test_nan_in_the_weights_is_an_error_that_says_where(folder: Path, strategy: Newton, said: str) -> None:
    network = ToyDenoiser()
    fisher = random_fisher(network, "all")
    with torch.no_grad():
        network.conv_out.bias[0] = torch.nan
    with pytest.raises(InputError, match=said):
        unlearned(folder, module(network, fisher=fisher, strategy=strategy))


def test_step_that_is_far_too_long_is_an_error_that_names_a_query(folder: Path) -> None:
    with pytest.raises(InputError, match=r"loss of 'query-00000' is (inf|nan) after unlearning; choose a smaller step"):
        unlearned(folder, module(strategy=Newton(alpha=1e38, N=1)))


def test_datamodule_without_queries_is_an_error(folder: Path) -> None:
    class Plain(LightningDataModule):
        def train_dataloader(self) -> Any:
            return [0]

    with pytest.raises(InputError, match="needs a datamodule with queries"):
        trainer(folder).fit(module(), Plain())


@pytest.mark.parametrize("wrong", [{"rise_draws": 0}, {"damping": -0.1}, {"damping": float("nan")}])
def test_numbers_out_of_range_are_errors(folder: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"rise_draws|[Dd]amping"):
        unlearned(folder, module(**wrong))


def test_unlearning_and_scoring_noise_of_a_training_picture_used_as_a_query_are_disjoint(
    folder: Path, tmp_path: Path
) -> None:
    """A picture that is query and sample at once, seed 0 for both: no noise tensor is drawn twice."""
    drawn: list[Tensor] = []

    class Recording(ToyObjective):
        def __call__(self, network: nn.Module, batch: Any, timesteps: Tensor, noise: Tensor) -> Tensor:
            drawn.extend(noise)
            return super().__call__(network, batch, timesteps, noise)

    data = toy_data(folder, query_keys=["sample-00000"], draws=12)
    data.query_patterns = data.shard_patterns
    found = module(objective=Recording(), strategy=Newton(alpha=1.0, N=20), rise_draws=5)
    unlearn(found, data)
    unlearning = {noise.numpy().tobytes() for noise in drawn}
    assert len(unlearning) == 12 + 5
    drawn.clear()
    score(found, data, tmp_path / "out", None)
    scoring = {noise.numpy().tobytes() for noise in drawn}
    assert scoring
    assert not scoring & unlearning
    assert generator_for("unlearning", 0).initial_seed() != generator_for("scoring", 0).initial_seed()
