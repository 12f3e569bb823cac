"""distill on a tiny Llama: it recovers, keeps masks, resumes bit for bit, runs in parallel."""

import contextlib
import copy
import json
import subprocess
import sys

import pytest
import torch

import sparsekern as sk
from python_tests.clock import Clock
from python_tests.finetune.distill_child import SAVING
from python_tests.finetune.tiny import OPTIONS, WINDOW, pair, rows, run, weights
from python_tests.oneshot.driver_models import build, run_prune, tokens
from sparsekern.errors import FormatError
from sparsekern.finetune import (
    SRSTE,
    Magnitude,
    Masked,
    build_cache,
    data,
    distill,
    loop,
    losses,
    trainer,
)
from sparsekern.finetune.metrics import plot, read_metrics
from sparsekern.finetune.recipe import Recipe
from sparsekern.finetune.teacher import LiveTeacher, Split, cache_bytes


def test_recovers_towards_the_teacher_and_compresses(tmp_path):
    teacher, student = pair()
    test = tokens(1, 8 * WINDOW, seed=11).reshape(-1)

    def divergence(model):
        ids = test.view(8, WINDOW)
        with torch.no_grad():
            log_p, log_q = (m(input_ids=ids).logits.log_softmax(-1) for m in (model, teacher))
        return float((log_q.exp() * (log_q - log_p)).sum(-1).mean())

    report = run(
        student,
        teacher,
        data.Corpus(rows(200)),
        steps=60,
        evaluate={"test": test, "kl": divergence},
        eval_every=20,
        folder=tmp_path,
    )
    first, last = report.evaluations[0], report.final
    assert [row["step"] for row in report.evaluations] == [0, 20, 40, 60]
    logs = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert logs[-1]["loss"] < 0.7 * logs[0]["loss"] and logs[-1]["lr"] < logs[1]["lr"]
    assert last["kl"] < 0.8 * first["kl"]
    assert last["test"] == pytest.approx(sk.perplexity(student, test, window=WINDOW))
    assert report.violations == 0 and report.tokens == 60 * 4 * WINDOW
    assert report.overlap["test"]["found"] == 0 and report.overlap["test"]["test"] > 0
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["teacher"] == "live" and stored["data"]["tokens"] == 200 * WINDOW
    assert (tmp_path / "plot.png").stat().st_size > 1000 and plot(tmp_path).exists()
    ids = tokens(2, 12)
    with torch.no_grad():
        want = student(input_ids=ids).logits
        assert report.masked.compress() == {}
        torch.testing.assert_close(student(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)
    assert sum(isinstance(m, sk.SparseLinear) for m in student.modules()) == 14


def test_resume_after_sigkill_is_bit_equal(tmp_path):
    command = [sys.executable, "-m", "python_tests.finetune.distill_child", "killed"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=900)
    assert done.returncode == -9, done.stderr[-2000:]
    assert max(row["step"] for row in read_metrics(tmp_path)) == 5
    teacher, student = pair(attention_dropout=0.1)
    report = run(student, teacher, folder=tmp_path, **SAVING)
    assert report.resumed == 4 and report.steps == 8
    teacher, whole = pair(attention_dropout=0.1)
    run(whole, teacher, log_every=SAVING["log_every"])
    assert torch.equal(weights(student), weights(whole))
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 9))
    again = pair(attention_dropout=0.1)[1]  # a finished run is loaded, not repeated
    assert run(again, teacher, folder=tmp_path, **SAVING).resumed == 8
    assert torch.equal(weights(again), weights(whole))
    with pytest.raises(ValueError, match="another recipe"):
        run(pair()[1], teacher, folder=tmp_path, lr=1e-4)
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(FormatError, match="checkpoint"):
        run(pair()[1], teacher, folder=tmp_path, **SAVING)


def test_two_processes_under_torchrun_equal_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "python_tests.finetune.distill_child", "parallel", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    teacher, student = pair()
    report = run(student, teacher, log_every=1)
    assert found["loss"] == pytest.approx(report.loss, rel=1e-3)
    torch.testing.assert_close(found["weights"], weights(student), rtol=1e-3, atol=1e-4)


def test_accumulation_equals_one_batch():
    teacher, one = pair()
    two = copy.deepcopy(one)
    run(one, teacher)
    run(two, teacher, micro_batch=1)
    torch.testing.assert_close(weights(one), weights(two), rtol=1e-3, atol=1e-4)


def test_cached_teacher_equals_the_live_one(tmp_path):
    teacher, one = pair()
    two, three = copy.deepcopy(one), copy.deepcopy(one)
    corpus = data.Corpus(rows())
    folder = build_cache(teacher, corpus, tmp_path / "top", k=64, progress=False)  # all of them
    live = run(one, teacher, corpus)
    cached = run(two, folder, corpus)
    assert cached.teacher == "cache"
    assert cached.loss == pytest.approx(live.loss, rel=0.02)
    build_cache(teacher, corpus, tmp_path / "top", k=64, progress=False)  # is there already
    with pytest.raises(FormatError, match="a cache of this run"):
        build_cache(teacher, corpus, tmp_path / "top", k=8, progress=False)
    with pytest.raises(ValueError, match="max_bytes"):
        build_cache(teacher, corpus, tmp_path / "x", max_bytes=cache_bytes(corpus, 64) - 1)
    with pytest.raises(FormatError, match="a cache of rows"):
        run(three, folder, rows(seed=8))


def test_offloaded_blocks_bfloat16_and_cross_entropy():
    teacher, student = pair()
    twins = [copy.deepcopy(student) for _ in range(4)]
    run(student, teacher)
    assert run(twins[0], teacher, offload_teacher=True).teacher == "offloaded"
    assert torch.equal(weights(student), weights(twins[0]))
    report = run(twins[1], teacher, block=0.5, alpha=0.3, temperature=2.0)
    assert report.violations == 0 and not torch.equal(weights(student), weights(twins[1]))
    low = twins[2].to(torch.bfloat16)
    report = run(low, teacher, precision="bfloat16", masks=Masked(low, schedule=SRSTE(2, 4)))
    assert report.violations == 0 and {p.dtype for p in low.parameters()} == {torch.bfloat16}
    report = run(twins[3], None, alpha=1.0)
    assert report.teacher == "none" and report.violations == 0


def test_compiled_student_takes_the_same_steps():
    teacher, one = pair()
    two = copy.deepcopy(one)
    run(one, teacher)
    import torch._dynamo

    torch._dynamo.reset()
    original = torch.compile
    try:
        torch.compile = lambda f, **options: original(f, backend="aot_eager", **options)
        run(two, teacher, compile=True)
    finally:
        torch.compile = original
    torch.testing.assert_close(weights(one), weights(two), rtol=1e-3, atol=1e-4)


def test_minutes_end_the_run_and_the_rate_falls():
    teacher, student = pair()
    report = run(student, teacher, steps=None, minutes=0.02, log_every=1)
    assert report.steps >= 2 and report.seconds >= 1.2 and report.violations == 0
    recipe = Recipe(lr=1.0, warmup=0.1, final=0.1)
    rates = [recipe.rate(x) for x in (0.0, 0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1])


def test_limit_stops_with_a_checkpoint_and_goes_on(tmp_path):
    teacher, one = pair()
    two = copy.deepcopy(one)
    run(one, teacher, log_every=1)
    options = dict(folder=tmp_path, log_every=1)
    first = run(two, teacher, limit_seconds=1e-6, **options)
    assert first.stopped and 1 <= first.steps < OPTIONS["steps"] and first.violations == 0
    assert (tmp_path / "checkpoint.pt").exists()
    teacher, again = pair()
    second = run(again, teacher, **options)
    assert not second.stopped and second.resumed == first.steps
    torch.testing.assert_close(weights(again), weights(one), rtol=0, atol=0)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    """Of the same recipe, rows and shapes, but for what each name says."""
    options = dict(folder=tmp_path, steps=2, save_every=1)
    teacher, student = pair()
    first = run(student, teacher, **options)
    again = run(student, teacher, **options)
    assert again.resumed == 2 and again.loss == first.loss
    dense = build("llama", seed=7)
    other, deeper = pair(seed=7), pair(num_hidden_layers=3)
    wanda = copy.deepcopy(teacher).requires_grad_(True)
    run_prune(wanda, "wanda", compress=False)
    for model, asked, more, name in (
        (student, dense, {}, "another weights of the teacher"),
        (other[1], other[0], {}, "another weights of the teacher, masks"),
        (wanda, teacher, {}, "another masks"),
        (deeper[1], deeper[0], {}, "another weights of the teacher, model, masks"),
        (pair()[1], teacher, {"schedule": Magnitude(every=1)}, "another schedule, masks"),
    ):
        before = weights(model)
        with pytest.raises(ValueError, match=f"got {name}. Choose another folder"):
            run(model, asked, **options, **more)
        assert torch.equal(weights(model), before)
    for foreign in ({"a": 1}, [1]):
        torch.save(foreign, tmp_path / "checkpoint.pt")
        with pytest.raises(FormatError, match="a checkpoint of distill in .* Choose another"):
            run(student, teacher, **options)


def test_a_damaged_manifest_of_a_cache(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(FormatError, match="JSON in .*manifest.json, got .* Build the cache again"):
        run(pair()[1], tmp_path)


def test_limit_shortens_a_run_by_minutes(monkeypatch):
    clock = Clock(0.05)
    for module in (trainer, loop):
        monkeypatch.setattr(module, "time", clock)
    teacher, student = pair()
    report = run(student, teacher, steps=None, minutes=60, limit_seconds=4, shorten=True)
    assert not report.stopped and 2 < report.seconds < 4.2 and report.recipe["minutes"] < 0.1
    with pytest.raises(ValueError, match="shorten"):
        run(student, teacher, limit_seconds=4)
    with pytest.raises(ValueError, match="minutes with shorten"):
        run(student, teacher, limit_seconds=4, shorten=True)


def test_text_made_by_the_teacher(tmp_path):
    teacher, student = pair()
    made = data.generate(
        teacher, 100, seed=5, window=WINDOW, batch=3, cache=tmp_path, progress=False
    )
    assert made.rows.shape == (7, WINDOW) and (made.rows[:, 0] == 1).all()  # bos
    (file,) = tmp_path.glob("*.safetensors")
    stamp = file.stat().st_mtime_ns
    again = data.generate(
        teacher, 100, seed=5, window=WINDOW, batch=3, cache=tmp_path, progress=False
    )
    assert torch.equal(made.rows, again.rows) and file.stat().st_mtime_ns == stamp
    fresh = data.generate(teacher, 100, seed=5, window=WINDOW, batch=3, cache=False, progress=False)
    assert torch.equal(made.rows, fresh.rows)
    other = data.generate(teacher, 100, seed=6, window=WINDOW, batch=3, cache=False, progress=False)
    assert not torch.equal(made.rows, other.rows)
    prompts = rows(2)[:, :4]
    prompted = data.generate(
        teacher, 60, window=WINDOW, prompts=prompts, cache=False, progress=False
    )
    assert torch.equal(prompted.rows[:, :4].long(), prompts[torch.arange(4) % 2])
    report = distill(
        student, teacher, None, window=WINDOW, generate_tokens=160, steps=2, batch=4,
        device="cpu", progress=False,
    )  # fmt: skip
    assert report.data["sources"][0]["kind"] == "teacher"
    assert "160 of 160 tokens of text made by the teacher" in report.summary()


def test_samples_follow_the_teacher():
    """The first sampled token's frequencies against the softmax of the teacher's logits."""
    teacher = build("llama")
    made = data.generate(teacher, 8000, window=2, batch=4000, cache=False, progress=False)
    with torch.no_grad():
        p = teacher(input_ids=torch.tensor([[1]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(made.rows[:, 1].long(), minlength=len(p)) / made.rows.shape[0]
    assert float((counts - p).abs().sum()) / 2 < 0.06  # total variation; 0.04 is expected


def test_pack_and_order():
    packed = data.pack([torch.arange(5), torch.arange(10, 14)], 4, separator=99)
    assert packed.tolist() == [[0, 1, 2, 3], [4, 99, 10, 11]]
    seen = torch.cat([data.batch_rows(10, 4, 7, step) for step in range(5)])
    assert sorted(seen[:10].tolist()) == list(range(10)) == sorted(seen[10:].tolist())
    assert not torch.equal(seen[:10], seen[10:])
    assert torch.equal(data.batch_rows(10, 4, 7, 2), seen[8:12])
    with pytest.raises(ValueError, match="at least 8 tokens"):
        data.pack([torch.arange(5)], 8)


def test_overlap_counts_ngrams():
    train = torch.randint(0, 1000, (5, 64))
    test = torch.randint(0, 1000, (200,))
    assert data.overlap(train, test).found == 0
    test[50:80] = train[2, 10:40]
    found = data.overlap(train, test, n=13)
    assert (found.found, found.test) == (30 - 12, 200 - 12)
    test[100:112] = train[3, :12]  # one token short of an n-gram
    assert data.overlap(train, test, n=13).found == 18
    rest, dropped = data.without_overlap(data.Corpus(train), test)
    assert dropped == 1 and torch.equal(rest.rows, train[[0, 1, 3, 4]])
    assert data.overlap(rest.rows, test).found == 0


def test_models_whose_logits_are_no_plain_product():
    plain = Split(build("llama"))
    assert plain.plain and plain.head is not None
    capped = build("gemma2", final_logit_softcapping=5.0)
    split = Split(capped)
    assert not split.plain and split.head is None
    teacher = LiveTeacher(copy.deepcopy(capped), torch.device("cpu"))
    ids = tokens(2, 8)
    ((target, _),) = teacher.targets([ids], [ids[:, 0]])
    assert target.logits.shape == (16, 64)
    from python_tests.oneshot.driver_models import run_prune

    run_prune(capped, "magnitude", compress=False)
    report = run(capped, teacher.split.model, steps=3)
    assert report.violations == 0 and "materialised" in report.notes[0]


def test_errors():
    teacher, student = pair()
    with pytest.raises(ValueError, match="alpha=1"):
        run(student, None)
    with pytest.raises(ValueError, match="steps or minutes"):
        run(student, teacher, minutes=1)
    with pytest.raises(TypeError, match="learning_rate"):
        run(student, teacher, learning_rate=1)
    with pytest.raises(ValueError, match="the model itself"):
        run(student, student)
    with pytest.raises(ValueError, match="2:4 sparse Linear layers"):
        run(build("llama"), teacher)
    Masked(student).compress()
    with pytest.raises(ValueError, match="14 SparseLinear"):
        run(student, teacher)


def test_one_block_is_compiled_for_all_of_them(monkeypatch):
    """Student and teacher are one graph each, however many blocks there are; evaluations are not
    compiled."""
    import torch._dynamo

    torch._dynamo.reset()
    graphs, original = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = lambda f, **options: original(f, **{**options, "backend": backend})  # noqa: E731
    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(losses, "compiled", lambda a, t: lambda *x: losses.one_chunk(*x, a, t))
    teacher, student = pair(layers=4)
    run(student, teacher, compile=True, evaluate={"text": rows(4, 5)}, eval_every=3)
    assert len(graphs) == 2, len(graphs)
    assert all(m._compiled_call_impl is None for x in (teacher, student) for m in x.modules())


def test_on_step_ends_a_run():
    teacher, student = pair()
    report = run(student, teacher, on_step=lambda step: step == 3)
    assert report.steps == 3 and report.violations == 0 and not report.stopped
    assert report.notes[-1] == "ended by on_step with step 3" and report.loss == report.loss
    assert report.first_step > 0


def test_without_logs_the_last_step_is_logged_and_a_limit_holds(tmp_path, monkeypatch):
    teacher, student = pair()
    report = run(student, teacher, log_every=0, steps=3, folder=tmp_path / "whole")
    assert [row["step"] for row in read_metrics(tmp_path / "whole")] == [3]
    assert report.loss == read_metrics(tmp_path / "whole")[0]["loss"]
    clock = Clock(1.0)
    for module in (trainer, loop):
        monkeypatch.setattr(module, "time", clock)
    options = dict(log_every=0, steps=30, folder=tmp_path / "parts")
    report = run(student, teacher, limit_seconds=10, **options)
    assert report.stopped and 0 < report.steps < 10 and report.loss == report.loss


class Stop(Exception):
    pass


def test_on_step_ends_a_resumed_run_that_never_logged(tmp_path):
    def stop(step):
        if step == 3:
            raise Stop

    teacher, student = pair()
    options = dict(folder=tmp_path, save_every=2, log_every=9, steps=12)
    with pytest.raises(Stop):
        run(student, teacher, on_step=stop, **options)
    report = run(student, teacher, on_step=lambda step: step == 4, **options)
    assert (report.resumed, report.steps) == (2, 4) and report.loss == report.loss


@pytest.mark.parametrize("when", ["before", "during", "evaluation", "never"])
def test_what_is_put_back(when):
    """Dtypes, gradients, hooks and torch's random numbers; after an exception the modes, too."""

    def stop(_):
        raise Stop

    teacher, student = pair(attention_dropout=0.5)
    student.bfloat16().train().model.norm.eval()
    options = {
        "before": {"evaluate": {"a": 3}, "eval_window": 2048},
        "during": {"on_step": stop},
        "evaluation": {"evaluate": {"a": stop}, "eval_window": 2048},
        "never": {},
    }[when]
    modes, random = [m.training for m in student.modules()], torch.get_rng_state()
    masked = Masked(student)
    with pytest.raises((Stop, TypeError)) if options else contextlib.nullcontext():
        run(student, teacher, masks=masked, steps=2, **options)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert all(p.grad is None for p in student.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    after = [m.training for m in student.modules()]
    assert after == (modes if options else [False] * len(modes))
    count, own = masked.step, torch.optim.SGD(student.parameters(), 0.1)
    masked.attach(own)
    student(rows()).logits.square().mean().backward()
    own.step()
    assert masked.step == count + 1, "this optimizer counts the steps now"


def test_a_model_that_takes_more_than_ids_is_refused():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    sizes = dict(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=64)
    teacher = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    student = copy.deepcopy(teacher)
    run_prune(student, "magnitude", None, compress=False)
    with pytest.raises(ValueError, match="T5.* to take token ids alone, got ValueError.* causal"):
        run(student, teacher)


def test_a_teacher_without_logits_or_of_other_blocks_is_refused():
    teacher, student = pair()
    with pytest.raises(ValueError, match="expected logits of shape .*, got BaseModelOutput"):
        run(student, teacher.model)
    other = build("llama", hidden_size=16)
    with pytest.raises(ValueError, match=r"the teacher's 2 block outputs .* Pass block=0"):
        run(student, other, block=1.0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_on_whatever_the_caller_has(mode):
    teacher, student = pair()
    again = copy.deepcopy(student)
    run(student, teacher, steps=2)
    with mode():
        run(again, teacher, steps=2)
    assert torch.equal(weights(student), weights(again))


@pytest.mark.parametrize("value", [torch.ones(1), None, {"loss": 1.0}, torch.ones(2)])
def test_an_evaluation_gives_a_number(value):
    teacher, student = pair()
    options = OPTIONS | {"steps": 1, "evaluate": {"a": lambda _: value}}
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        assert distill(student, teacher, rows(), **options).final["a"] == 1
        return
    with pytest.raises(TypeError, match=r"a number from evaluate\['a'\], got .* Return one"):
        distill(student, teacher, rows(), **options)


def test_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch):
    """torch.save says "unexpected pos" where the disk is full."""

    def full(state, file):
        file.write_bytes(b"PK")
        raise RuntimeError("[enforce fail] . unexpected pos 64 vs 0")

    teacher, student = pair()
    run(student, teacher, folder=tmp_path, steps=2, save_every=1)
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="checkpoint.pt to be written, got .*pos 64 vs 0. Make room"):
        run(copy.deepcopy(student), teacher, folder=tmp_path, resume=False, steps=2, save_every=1)
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept
    assert not (tmp_path / "checkpoint.part").exists()


def test_the_speed_is_that_of_the_steps_after_the_first(monkeypatch):
    """Each step takes one second of this clock, so that counting the first one too would show."""
    monkeypatch.setattr(loop, "time", Clock(1.0))
    teacher, student = pair()
    report = run(student, teacher, steps=5)
    assert report.first_step == 1.0
    assert report.tokens_per_second == report.tokens / report.steps


def test_what_distill_refuses_before_anything_is_done(tmp_path):
    teacher, student = pair()
    before = weights(student)
    wide = copy.deepcopy(teacher)
    wide.resize_token_embeddings(200)
    file = tmp_path / "file"
    file.touch()
    ids, size = rows(), teacher.config.vocab_size
    for arguments, error, text in (
        ({"data": ["text"]}, TypeError, r"data: a Corpus or a tensor or None, got \['text'\]"),
        ({"data": {"input_ids": ids}}, TypeError, "data: a Corpus or a tensor"),
        ({"data": ids - 4}, ValueError, f"data: ids from 0 to {size - 1}, got -"),
        ({"data": ids + size}, ValueError, "Use the model's own tokenizer"),
        ({"teacher": wide}, ValueError, f"a vocabulary of {size}, got 200"),
        ({"teacher": 3}, TypeError, "teacher: "),
        ({"teacher": "nowhere"}, FormatError, r"got no nowhere.manifest.json. Pass the teacher as"),
        ({"evaluate": {"a": 3}}, TypeError, r"evaluate\['a'\]: a tensor of ids or a function"),
        ({"evaluate": {"a": ids + size}}, ValueError, r"evaluate\['a'\]: ids from 0"),
        ({"evaluate": ids}, TypeError, "evaluate: a dict"),
        ({"device": "gpu"}, ValueError, "device: a device such as"),
        ({"schedule": "rigl"}, TypeError, "schedule: a Schedule"),
        ({"folder": file}, ValueError, "folder: a folder, or the name of a new one"),
        (
            {"folder": file / "below"},
            OSError,
            "a folder that can be written, got .*which is a file",
        ),
        ({"window": 1}, ValueError, "window from 2"),
        ({"temperature": 0.0}, ValueError, "temperature > 0"),
        ({"betas": (0.9, 1.5)}, ValueError, "betas from 0 to below 1"),
        ({"generate_tokens": 64}, ValueError, "data=None with generate_tokens, got"),
        ({"window": 32}, ValueError, "rows of as many with window, got window=32"),
        ({"eval_window": 32}, ValueError, "ids to evaluate with eval_window"),
        ({"evaluate": {"a": len}, "eval_window": 32}, ValueError, "with eval_window"),
        ({"eval_every": 2}, ValueError, "evaluate with eval_every"),
        ({"save_every": 2}, ValueError, "a folder with save_every"),
        ({"shorten": True}, ValueError, "limit_seconds with shorten"),
        ({"alpha": 1.0}, ValueError, "block > 0 or data=None with teacher.*Leave teacher at None"),
        ({"alpha": 1.0, "teacher": None, "temperature": 2.0}, ValueError, "with temperature"),
        ({"alpha": 1.0, "teacher": None, "offload_teacher": True}, ValueError, "offload_teacher"),
        ({"passes": 3.0}, ValueError, "neither steps nor minutes with passes"),
        ({"schedule": Magnitude(every=9)}, ValueError, "steps >= 9, at which Magnitude .* got 8"),
    ):
        given = {"data": ids, "teacher": teacher, **OPTIONS, **arguments}
        with pytest.raises(error, match=text):
            distill(student, given.pop("teacher"), given.pop("data"), **given)
    assert torch.equal(weights(student), before)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "T5ForConditionalGeneration"])
def test_a_teacher_that_cannot_write_is_refused(kind):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    sizes |= dict(intermediate_size=64, initializer_range=1.0) if kind[0] == "B" else {"d_ff": 64}
    made = getattr(transformers, kind)
    teacher = made(made.config_class(**sizes))
    with pytest.raises(ValueError, match="to be causal|to take token ids alone"):
        data.generate(teacher, 8, window=8, start=3, cache=False, progress=False)
    with pytest.raises(TypeError, match="a Transformers model, got Linear. Unwrap it"):
        data.generate(torch.nn.Linear(2, 2), 8, start=3)


def test_a_cache_of_text_that_is_no_folder_or_damaged(tmp_path):
    teacher = build("llama")
    options = dict(window=8, start=3, cache=tmp_path / "texts", progress=False)
    data.generate(teacher, 8, **options)
    (file,) = (tmp_path / "texts").iterdir()
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(FormatError, match="cached rows, got a damaged file: .* Delete "):
        data.generate(teacher, 8, **options)
    with pytest.raises(OSError, match="a folder that can be written"):
        data.generate(teacher, 8, **options | {"cache": file})


def test_arguments_of_generate_and_pack():
    for call, error, text in (
        (lambda: data.generate(None, 8), TypeError, "teacher: an nn.Module, got None"),
        (lambda: data.generate(build("llama"), 0), ValueError, "tokens from 1 to"),
        (lambda: data.generate(build("llama"), 8, window=1), ValueError, "window from 2 to"),
        (lambda: data.generate(build("llama"), 8, prompts=rows(), start=2), ValueError, "start=2"),
        (
            lambda: data.generate(build("llama"), 8, start=999),
            ValueError,
            "below 64, got 999. Pass",
        ),
        (lambda: data.pack(["text"], 4), TypeError, r"documents\[0\]: a tensor of ids, got 'text'"),
    ):
        with pytest.raises(error, match=text):
            call()


def test_a_model_with_adapters_gives_its_logits():
    peft = pytest.importorskip("peft", reason="needs peft, which is no dependency")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build("llama"), config).eval()
    split, ids = Split(model), tokens(2, 8)
    assert not split.plain
    assert torch.equal(split(ids)[0], model(ids).logits)
