"""Rollouts on servers: what is pushed, what is proven, and what a server may not do."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from torch import Tensor
from torch.testing import assert_close

from lightning_perl.cli import main
from lightning_perl.models.adapters import OFF
from lightning_perl.models.loading import load_trunk
from lightning_perl.models.roles import Role
from lightning_perl.models.trunk import Trunk
from lightning_perl.modules import PPO, RAFT, RLOO, ReMax
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.packaged import unpackaged
from lightning_perl.rollouts import VllmServers, servers
from lightning_perl.rollouts.rollout import Rollout
from lightning_perl.rollouts.sampling import SamplingSpec
from lightning_perl.rollouts.server import Server
from lightning_perl.rollouts.servers import PROBE, _gap, _logprobs, _rounding
from tests.modules import tiny
from tests.modules.ranks import on_ranks
from tests.rollouts.fake_server import FakeServer
from tests.test_project import marked_block
from tests.test_scale import SMALL

SAMPLING = SamplingSpec(max_new_tokens=6, temperature=0.7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    return tiny.with_head(tiny.save_trunk(root / "plain"), root / "trunk")


@pytest.fixture(scope="module")
def served(folder: Path) -> Trunk:
    return load_trunk(str(folder), "float64")


@pytest.fixture(scope="module")
def module(folder: Path) -> RLOO:
    return tiny.on_policy(RLOO, folder, sampling=SAMPLING, samples=2)


Start = Callable[..., FakeServer]


@pytest.fixture
def start(served: Trunk) -> Iterator[Start]:
    """Starts fake servers that end with the test."""
    running: list[FakeServer] = []

    def begin(fault: str = "", **options: Any) -> FakeServer:
        running.append(FakeServer(served, fault, **options))
        return running[-1]

    yield begin
    for server in running:
        server.stop()


def rolled_out(module: OnPolicy, rollout_index: int = 0) -> tuple[Rollout, dict[str, Tensor]]:
    """A rollout that was looked at, as training does it."""
    rollout = module.collect(tiny.prompts(2), rollout_index, samples=module.samples)
    scored = module.score(rollout)
    return rollout, module.rollout_engine.mismatch(rollout, scored.logprobs)


def on(module: OnPolicy, *servers: FakeServer, **options: Any) -> VllmServers:
    """Lets a module sample on these servers, with a policy that has learned something."""
    tiny.train_adapters(module, seed=1)
    module.rollout_engine = VllmServers([server.url for server in servers], **options)
    return module.rollout_engine


# When it begins to misbehave, what the run ends with, and arguments of the engine.
FAULTS: dict[str, tuple[str, str]] = {
    "dtype": ("start", r"dtype is torch.bfloat16, not torch.float64"),
    "quantized": ("start", r"quantization is fp8, not None"),
    "rank": ("start", r"--max-lora-rank is 1, below 2"),
    "no lora": ("start", r"--max-lora-rank is 0, below 2"),
    "raw mode": ("start", r"--logprobs-mode is raw_logprobs, not processed_logprobs"),
    "replicas": ("start", r"--data-parallel-size is 2, not 1"),
    "window": ("start", r"--max-model-len is 8, below 13"),
    "tokenizer": ("start", r"what its tokenizer reads is \[.*3\], not \["),
    "another model": ("start", r"something else as the trunk: .* by 0.01 nats .* no model of this"),
    "sees no folder": ("start", r"At the start all servers must answer: .*No adapter found for"),
    "base": ("start", r"something else as actor-\w+-1: .* They are those of the trunk\."),
    "old adapter": ("push", r"something else as actor-(\w+)-2: .* They are those of actor-\1-1\."),
    "refuses": ("push", r"/v1/load_lora_adapter refuses, HTTP 400: LoRA rank of actor-\w+-2 is"),
    "no prompt": ("push", r"gives no log-probability of each of a prompt's tokens \(TypeError"),
    "forgets the adapter": ("sampling", r"sampled with other log-probabilities.*lost the adapter"),
    "temperature": ("sampling", r"sampled with other log-probabilities.* another temperature"),
    "other ids": ("sampling", r"sampled with other log-probabilities than ours"),
    "unknown ids": ("sampling", r"gives tokens that the trunk has not: \[.*99\]"),
    "drops": ("sampling", r"No server is left .*/v1/completions: RemoteProtocolError"),
    "slow": ("sampling", r"No server is left .*/v1/completions: ReadTimeout"),
    "crowded": ("sampling", r"No server is left .*/v1/completions: HTTP 429"),
    "html": ("sampling", r"/v1/completions answers '<html>502 Bad Gateway</html>' and no JSON"),
    "evicts": ("sampling", r"No server is left .*HTTP 404 .*`actor-\w+-2` does not exist"),
    "no log-probabilities": ("sampling", r"answers without token ids and their log-probabilities"),
    "too few log-probabilities": ("sampling", r"gives \d log-probabilities of \d tokens"),
    "nan": ("sampling", r"gives log-probabilities that are none: \[nan"),
    "no tokens": ("sampling", r"gives 0 tokens of at most 6"),
    "goes on": ("sampling", r"goes on behind a token that ends a response: \[2, 2\]"),
    "ends early": ("sampling", r"ends by '\w+' after 1 tokens: \[3\]"),
    "another prompt": ("sampling", r"reads another prompt than was sent \(\[4\]\)"),
    "no choice": ("sampling", r"answers without token ids .* \(IndexError"),
}


def test_a_password_is_sent_and_not_shown() -> None:
    server = Server("http://me:secret@localhost:8000/", 1.0)
    assert server.url == "http://localhost:8000"
    assert str(server._client.base_url).startswith("http://me:secret@")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.filterwarnings("ignore:.*its responses go to the other servers")
def test_what_a_server_may_not_do(fault: str, module: RLOO, start: Start) -> None:
    when, words = FAULTS[fault]
    server = start(fault if when == "start" else "")
    engine = on(module, server)
    if when != "start":
        rolled_out(module)
        if fault == "slow":
            engine._servers[0]._client.timeout = 0.1
        server.fault = fault
        tiny.train_adapters(module, seed=2)
    with pytest.raises(RuntimeError, match=words) as raised:
        rolled_out(module)
    assert server.url in str(raised.value)
    assert "\n" not in str(raised.value)
    module.rollout_engine.close()


def test_an_old_adapter_is_found_where_the_new_one_moved_less_than_rounding(
    module: RLOO, start: Start
) -> None:
    server = start()
    engine = on(module, server)
    rolled_out(module)
    tiny.train_adapters(module, seed=2)
    probe = module.policy_trunk.probe(PROBE)[0].tolist()
    (before,) = engine._names
    moved = _gap(_logprobs(module.policy_trunk, "actor", probe), engine._ours[before])
    engine._tolerance = 2 * moved
    server.fault = "old adapter"
    with pytest.raises(RuntimeError, match=f"log-probabilities are those of {before}, from which"):
        rolled_out(module)
    server.fault = ""
    rolled_out(module)


# ---- what servers do rightly -------------------------------------------------------------------


def test_servers_share_the_rows_and_one_that_dies_loses_its_own_only(
    module: RLOO, start: Start
) -> None:
    alone = start()
    on(module, alone)
    expected, gaps = rolled_out(module)
    assert gaps["mismatch_largest"] < 1e-12

    one, two = start(), start("drops")
    on(module, one, two)
    with pytest.warns(match=f"{two.url}.*its responses go to the other servers"):
        shared, _ = rolled_out(module)
    assert one.completed == len(expected.row)
    for ours, theirs in zip(shared, expected, strict=True):
        assert_close(ours, theirs, rtol=0, atol=1e-12)

    # It is asked again at the next push, when it has been started anew.
    two.stop()
    back = start(port=two.port)
    tiny.train_adapters(module, seed=2)
    with pytest.warns(match=f"{back.url} answers again"):
        rolled_out(module, 1)
    assert back.completed > 0
    one.fault = back.fault = "drops"
    with (
        pytest.warns(match="its responses go to the other servers"),
        pytest.raises(RuntimeError, match=f"No server is left .*{one.url}.*{back.url}"),
    ):
        rolled_out(module, 2)


def test_a_push_is_a_folder_that_others_read_and_that_goes_when_nobody_names_it(
    module: RLOO, start: Start, tmp_path: Path
) -> None:
    server, given = start(), tmp_path / "pushed"
    given.mkdir(mode=0o700)  # another program's, too
    engine = on(module, server, folder=str(given))
    rolled_out(module)
    assert stat.S_IMODE(given.stat().st_mode) == 0o700
    (first,) = server.adapters.values()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (first, *first.iterdir())}
    assert modes.pop(first.name) == 0o755
    assert modes == {"adapter_config.json": 0o644, "adapter_model.safetensors": 0o644}
    rolled_out(module, 1)
    assert list(server.adapters.values()) == [first]  # nothing has changed
    tiny.train_adapters(module, seed=2)
    rolled_out(module, 1)
    (second,) = server.adapters.values()
    assert list((tmp_path / "pushed").iterdir()) == [second]
    engine.close()
    assert server.adapters == {}
    assert list((tmp_path / "pushed").iterdir()) == []


def test_a_token_weighs_what_it_is_likelier_here_than_there(module: RLOO, start: Start) -> None:
    on(module, start())
    rollout, _ = rolled_out(module)
    assert rollout.logprobs is not None
    scored = module.score(rollout)
    engine, mask = module.rollout_engine, rollout.response_mask
    shift = torch.where(torch.arange(mask.shape[1]) % 2 == 0, 5e-7, -5e-7).double()
    drawn = rollout._replace(logprobs=scored.logprobs - shift)
    weights = engine.weighted(drawn, scored).importance
    assert weights is not None
    assert_close(weights[mask], shift.exp().clamp(max=2.0).expand_as(mask)[mask])
    experience, _ = module.experience(rollout, scored)

    def gradient(importance: Tensor | None) -> Tensor:
        _, (step,) = tiny.rehearse(module, experience._replace(importance=importance))
        return torch.cat([part.flatten() for part in step.values()])

    ones, plain = torch.ones_like(experience.old_logprobs), gradient(None)
    assert torch.equal(gradient(ones), plain)
    assert_close(gradient(2 * ones), 2 * plain)
    heavy = 2 * ones
    heavy[0] = 0.0
    assert not torch.allclose(gradient(heavy), 2 * plain)


def test_a_selecting_method_keeps_the_weights_of_what_it_keeps(folder: Path) -> None:
    module = tiny.on_policy(RAFT, folder, samples=3)
    rollout = module.collect(tiny.prompts(2), 0, samples=3)
    scored = module.score(rollout)
    rows = torch.arange(6.0).unsqueeze(1).expand_as(scored.logprobs)
    experience, _ = module.experience(rollout, scored._replace(importance=rows))
    assert experience.importance is not None
    best = scored.scores.view(2, 3).argmax(1) + torch.tensor([0, 3])
    assert experience.importance[:, 0].tolist() == best.tolist()


def test_greedy_responses_are_not_taken_for_the_rollout(
    folder: Path, start: Start, tmp_path: Path
) -> None:
    engine = VllmServers([start().url])
    module = tiny.on_policy(ReMax, folder, sampling=SAMPLING, samples=2, rollout_engine=engine)
    trainer, _ = tiny.fit(module, tmp_path, [tiny.prompts(3)])
    assert trainer.callback_metrics["rollout/mismatch"] < 1e-12


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layout": "full"}, "rollout_engine: layout full trains the trunk.*another model"),
        ({"quantization": "nf4"}, "rollout_engine: quantization is nf4.*another model"),
    ],
)
def test_a_policy_that_no_server_has_is_refused_before_weights_are_read(
    settings: dict[str, Any], words: str
) -> None:
    engine = VllmServers(["http://localhost:1"])
    with pytest.raises(ValueError, match=words):
        tiny.on_policy(RLOO, Path("nowhere"), rollout_engine=engine, **settings)


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_run_whose_servers_die_or_that_is_killed_in_a_push_goes_on_as_if_nothing_had_been(
    folder: Path, start: Start, tmp_path: Path, overlap: Literal[0, 1]
) -> None:
    def run(
        server: FakeServer, name: str, path: Path | None = None, then: str = ""
    ) -> tuple[PPO, Trainer]:
        torch.manual_seed(1)
        engine = VllmServers([server.url], overlap=overlap)
        module = tiny.hydra(folder, sampling=SAMPLING, rollout_engine=engine)

        def break_down(trainer: Trainer, *_: object) -> None:
            wait(engine._running)
            server.fault = then if trainer.global_step else ""

        later = LambdaCallback(on_train_batch_end=break_down)
        saves = ModelCheckpoint(save_last=True, every_n_train_steps=1)
        trainer, _ = tiny.quiet_trainer(tmp_path / name, saves, later)
        batches = tiny.Batches([tiny.prompts(3, seed) for seed in range(3 + overlap)])
        held_out = tiny.Batches([tiny.prompts(2, 9)])
        trainer.fit(module, batches, held_out, ckpt_path=path, weights_only=True)
        return module, trainer

    straight, trainer = run(start(), "straight")
    assert trainer.callback_metrics["rollout/mismatch"] < 1e-12
    with (
        pytest.warns(match="its responses go to the other servers"),
        pytest.raises(RuntimeError, match="No server is left"),
    ):
        run(start(), "died", then="drops")
    server = start()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            run(server, "killed")
        os._exit(0)
    server.killed_by_second_push = child
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    server.killed_by_second_push = None
    # What was under way is learned from, before it is found that nobody samples what comes next.
    left = {"died": ("stopped.ckpt", start(), 1 + overlap), "killed": ("last.ckpt", server, 1)}
    for name, (file, asked, steps) in left.items():
        (path,) = (tmp_path / name).rglob(file)
        assert torch.load(path, weights_only=True)["global_step"] == steps
        again, goes_on = run(asked, name, path)
        assert goes_on.global_step == trainer.global_step == 3
        for key, weight in tiny.weights(straight).items():
            assert_close(again.state_dict()[key], weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("episodes", [4, 8, 11])
def test_nothing_is_sampled_that_is_not_learned(
    folder: Path, start: Start, tmp_path: Path, episodes: int
) -> None:
    server = start()
    engine = VllmServers([server.url], overlap=1)
    module = tiny.on_policy(RLOO, folder, samples=2, rollout_engine=engine, max_episodes=episodes)
    tiny.fit(module, tmp_path, [tiny.prompts(2, seed) for seed in range(5)])
    assert server.completed == module.episodes == -(-episodes // 4) * 4


def test_a_version_stays_loaded_while_it_is_sampled_from(
    folder: Path, start: Start, tmp_path: Path
) -> None:
    server = start("slow")
    engine = VllmServers([server.url], overlap=1)
    module = tiny.on_policy(RLOO, folder, samples=2, rollout_engine=engine)
    batches = [tiny.prompts(2, seed) for seed in range(3)]
    # Validation pushes the next version while the second rollout is under way.
    trainer, _ = tiny.fit(module, tmp_path, batches, held_out=batches[:1], val_check_interval=1)
    assert trainer.global_step == 2


@pytest.mark.parametrize("role", ["policy", "reference"])
def test_an_engine_that_is_closed_asks_for_nothing_more(
    module: RLOO, start: Start, monkeypatch: pytest.MonkeyPatch, role: Role
) -> None:
    server = start("slow")
    engine = on(module, server, at_once=1, overlap=1)
    module.start(tiny.prompts(4), 0, role, samples=2)
    (running,) = engine._running
    monkeypatch.setattr(servers, "LEAVE", 0.01)  # it is left in the middle of a response
    engine.close()
    wait([running])
    assert server.completed <= 1
    assert server.adapters == {}


@pytest.mark.parametrize("fault", ["forgets the adapter", "temperature", "other ids", "late"])
def test_a_stale_rollout_is_proven_by_the_policy_that_sampled_it(
    folder: Path, start: Start, tmp_path: Path, fault: str
) -> None:
    server = start()
    engine = VllmServers([server.url], overlap=1)
    module = tiny.on_policy(RLOO, folder, sampling=SAMPLING, samples=2, rollout_engine=engine)

    def spoil(trainer: Trainer, module: RLOO, batch: object, number: int) -> None:
        wait(engine._running)
        server.good = server.completed + 3
        if number == 2:
            tiny.train_adapters(module, seed=1)
        server.fault = fault if number == 3 else ""

    breaks = LambdaCallback(on_train_batch_start=spoil)
    with pytest.raises(RuntimeError, match="sampled with other log-probabilities than ours"):
        tiny.fit(module, tmp_path, [tiny.prompts(2, seed) for seed in range(5)], breaks)
    assert module.trainer.global_step == 3
    assert server.adapters == {}


def test_bfloat16_has_a_tolerance_that_grows_with_the_logits(folder: Path) -> None:
    trunk = load_trunk(str(folder), "bfloat16")
    server = FakeServer(trunk)
    module = tiny.on_policy(RLOO, folder, sampling=SAMPLING, samples=2, trunk_dtype="bfloat16")
    on(module, server)
    _, gaps = rolled_out(module)
    assert 1e-4 < gaps["mismatch"] < 3e-2
    server.stop()
    row = [3, 4, 5, 6]
    assert _rounding(trunk, row) == 3e-2
    trunk.lm_head.weight.data.mul_(100)
    with torch.no_grad(), trunk.switch.use(OFF):
        logits = trunk.model(torch.tensor([row])).logits[0, :-1].float()
    assert_close(_rounding(trunk, row), 2**-7 * float(logits.abs().amax(1).mean()))


def trained(folder: Path, root: Path, urls: list[str], ranks: int) -> dict[str, Tensor]:
    """The weights after overlapping rollouts of odd numbers of prompts."""
    engine = VllmServers(urls, overlap=1)
    module = tiny.on_policy(RLOO, folder, sampling=SAMPLING, samples=2, rollout_engine=engine)
    tiny.fit(module, root, [tiny.prompts(3, seed) for seed in range(3)], devices=ranks)
    return tiny.weights(module)


def test_two_ranks_on_two_servers_are_one_on_one(
    folder: Path, start: Start, tmp_path: Path
) -> None:
    expected = trained(folder, tmp_path / "one", [start().url], 1)
    servers = [start(), start()]
    urls = [server.url for server in servers]
    ranks = on_ranks(2, tmp_path / "ranks", trained, folder, tmp_path / "two", urls, 2)
    assert all(server.completed for server in servers)
    for weights in ranks:
        for name, weight in expected.items():
            assert_close(weights[name], weight, rtol=0, atol=1e-12)
    # What one rank finds out ends them all.
    servers[1].fault = "no prompt"
    with pytest.raises(AssertionError, match="gives no log-probability of each of a prompt's"):
        on_ranks(2, tmp_path / "wrong", trained, folder, tmp_path / "three", urls, 2)


# ---- the page ------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "servers.md"


def commands_of(terminal: str) -> list[list[str]]:
    """Words of the commands in one of the page's blocks."""
    block = marked_block(PAGE.read_text("utf-8"), f"{terminal} terminal")
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def test_the_page_trains_and_talks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    trunk = load_trunk(unpackaged("packaged:quickstart/trunk"))
    server = FakeServer(trunk)
    fit, generate = (words[3:] for words in commands_of("second"))
    fit = [word.replace("http://localhost:8000", server.url) for word in fit]
    main([*fit, *SMALL, "--model.max_episodes=6", "--trainer.callbacks=[]"])
    assert server.completed > 6
    main(generate)
    here = capsys.readouterr().out
    assert "[score " in here
    url = f'--rollout_engine.urls=["{server.url}"]'
    main([*generate, "--rollout_engine=VllmServers", url, "--beside=reference"])
    assert "policy, score " in capsys.readouterr().out
    data: dict[str, object] = {"train": SMALL[1].partition("=")[2], "rows": "prompts"}
    data |= {"max_tokens": 80, "max_response_tokens": 32}
    given = {"out": "compared", "trunk": "packaged:quickstart/trunk", "prompts": "2"}
    given |= {"adapters": json.dumps({"ppo": "runs/quickstart/latest/adapters/actor"})}
    given |= {"data": json.dumps({"class_path": "PreferenceDataModule", "init_args": data})}
    given |= {
        "rollout_engine": json.dumps(
            {"class_path": "VllmServers", "init_args": {"urls": [server.url]}}
        )
    }
    drawn = server.completed
    main(
        [
            "compare",
            *(f"--{key}={value}" for key, value in given.items()),
            "--sampling.max_new_tokens=8",
        ]
    )
    assert server.completed == drawn + 4
    assert server.adapters == {}
    header, *rows = Path("runs/quickstart/version_0/metrics.csv").read_text().splitlines()
    columns = [row.split(",")[header.split(",").index("rollout/mismatch")] for row in rows]
    assert max(float(number) for number in columns if number) < 1e-5
    server.stop()


def test_the_settings_of_the_page_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    (settings,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", "quickstart", "--config", settings, "--print_config"])
    printed = capsys.readouterr().out
    assert all(f"{name}:" in printed for name in inspect.signature(VllmServers).parameters)
