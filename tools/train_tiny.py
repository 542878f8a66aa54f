"""Train the embedded model: `python -m tools.train_tiny --work DIR --minutes 100`.

Stages, each left on accuracy and not on the clock (docs/lab-notes.md says what happened without them):

    pairs    rows of 64 symbols: name thing name thing ..., then the same in another order; 2, 4, 8 pairs
    skills   recall, restating and copying in words, lines about one cast, until facts and casts are kept
    world    stories, with the share of skills falling; the learning rate falls to a tenth with the minutes

`--init DIR` starts from exported weights (the tokenizer may have changed: rows of the embedding follow their
token). Checkpoints go to `--work`, the newest is resumed; `--export DIR` writes the running average as a
BF16 checkpoint.
"""

import argparse
import json
import platform
import random
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from . import tiny_tokenizer
from .stories import documents, skills, words
from .tiny_model import TinyModel, export_state, import_state
from .tiny_optim import Average, Muon, split_parameters

PATTERN, MTP_PATTERN = "M*MEM*EME", "*E"
KINDS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
CONFIG = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "vocab_size": 2048,
    "hidden_size": 160,
    "num_hidden_layers": len(PATTERN),
    "hybrid_override_pattern": PATTERN,
    "layers_block_type": [KINDS[c] for c in PATTERN],
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": MTP_PATTERN,
    "tie_word_embeddings": False,
    "residual_in_fp32": False,
    "hidden_dropout": 0.0,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "sliding_window": None,
    "rope_theta": 10000,
    "partial_rotary_factor": 1.0,
    "max_position_embeddings": 16384,
    "mamba_num_heads": 4,
    "mamba_head_dim": 64,
    "ssm_state_size": 32,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 32,
    "expand": 2,
    "mamba_hidden_act": "silu",
    "use_conv_bias": True,
    "mamba_proj_bias": False,
    "use_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "rescale_prenorm_residual": True,
    "use_mamba_kernels": False,
    "n_routed_experts": 48,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 96,
    "intermediate_size": 96,
    "moe_latent_size": 64,
    "n_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 192,
    "moe_shared_expert_overlap": False,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "mlp_hidden_act": "relu2",
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "initializer_range": 0.02,
    "num_logits_to_keep": 1,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
MTP_WEIGHT, MTP_EVERY, AUX_WEIGHT = (
    0.3,
    2,
    1e-3,
)  # the draft head learns on every second step: it costs a third


def write_checkpoint(directory, model, tokenizer, record):
    """Export to the HF layout: config, tokenizer, chat template, BF16 weights, how they came to be."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer.save(tokenizer, directory)
    template = Path(__file__).parent / "tiny_chat_template.jinja"
    if template.exists():
        (directory / "chat_template.jinja").write_text(template.read_text())
    (directory / "config.json").write_text(json.dumps(model.cfg, indent=2) + "\n")
    save_file(export_state(model), directory / "model.safetensors.part", metadata={"format": "pt"})
    (directory / "model.safetensors.part").chmod(0o644)
    (directory / "model.safetensors.part").rename(directory / "model.safetensors")
    (directory / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def read_checkpoint(directory, tokenizer=None):
    """Exported weights -> module; with a `tokenizer`, embedding rows move to where it has the same token."""
    directory = Path(directory)
    cfg = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    old = Tokenizer.from_file(str(directory / "tokenizer.json"))
    if tokenizer is not None and tokenizer.get_vocab() != old.get_vocab():
        model = TinyModel({**cfg, "vocab_size": CONFIG["vocab_size"]})
        fresh = export_state(model)
        for name in ("backbone.embeddings.weight", "lm_head.weight"):
            for token, i in tokenizer.get_vocab().items():
                ids = old.encode(tokenizer.decode([i]) or token, add_special_tokens=False).ids
                rows = [old.token_to_id(token)] if old.token_to_id(token) is not None else ids
                if rows:
                    fresh[name][i] = tensors[name][rows].float().mean(0)
            tensors[name] = fresh[name]
    else:
        model = TinyModel(cfg)
    import_state(model, tensors)
    return model


class Pairs:
    """Rows of symbols, the densest practice of recall; `weight` marks what can be known.

    A quarter of the rows: `count` (name, thing) pairs, then the names again, each with its thing. A quarter:
    pairs of any symbols. Half: random words, among them one or two names, each after its own verbs.
    """

    VERBS = "said asked cried thought whispered shouted called and but for when with hugged".split()  # noqa: SIM905

    def __init__(self, tokenizer, seed, length=64):
        self.rng, self.length, self.count = np.random.default_rng(seed), length, 2

        def ids(some):
            found = [tokenizer.token_to_id("Ġ" + w) for w in some]
            return np.array([i for i in found if i is not None])

        self.keys, self.values, self.verbs = ids(words.NAMES), ids(words.THINGS), ids(self.VERBS)
        self.symbols = ids(sorted({w for some in words.SLOTS.values() for w in some}))
        self.fillers = np.array([i for t, i in sorted(tokenizer.get_vocab().items()) if t.startswith("Ġ")])

    def batch(self, rows):
        ids = np.zeros((rows, self.length), np.int64)
        weight = np.zeros((rows, self.length), np.float32)
        for r in range(rows):
            kind = r % 4
            if kind >= 2:
                self._talk(ids[r], weight[r])
                continue
            if kind == 0:
                keys, values = (self.rng.permutation(s)[: self.count] for s in (self.keys, self.values))
            else:
                keys, values = self.rng.permutation(self.symbols)[: 2 * self.count].reshape(2, -1)
            asked = [self.rng.permutation(self.count) for _ in range(self.length // (2 * self.count))]
            order = np.concatenate([np.arange(self.count), *asked])[: self.length // 2]
            ids[r, 0::2], ids[r, 1::2] = keys[order], values[order]
            weight[r, 2 * self.count + 1 :: 2] = 1
        first = np.zeros((rows, self.length), bool)
        first[:, 0] = True
        return ids, first, weight

    def _talk(self, ids, weight):
        """Fill one row: fillers, and now and then a verb with the name that belongs to it."""
        ids[:] = self.rng.choice(self.fillers, self.length)
        names = self.rng.permutation(self.keys)[: self.rng.integers(1, 3)]
        verbs = self.rng.permutation(self.verbs)
        at, seen = int(self.rng.integers(0, 4)), set()
        while at + 1 < self.length:
            k = int(self.rng.integers(len(verbs)))
            name = names[k % len(names)]
            ids[at], ids[at + 1] = verbs[k], name
            weight[at + 1] = float(name in seen and (len(names) == 1 or (k, name) in seen))
            seen |= {name, (k, name)}
            at += 2 + int(self.rng.integers(0, 3)) * int(self.rng.random() < 0.5)


class Mixed:
    """Packed rows of documents, a share of them from the `skills` mix."""

    def __init__(self, tokenizer, seed, length):
        self.rng, self.tokenizer, self.share = random.Random(seed), tokenizer, 1.0
        self.rows = documents.pack(self._documents(), length)

    def _documents(self):
        while True:
            mix = "skills" if self.rng.random() < self.share else "world"
            kind, pieces = documents.document(self.rng, mix)
            ids, weight = documents.encode(self.tokenizer, pieces)
            yield ids, weight * (2.0 if kind not in ("story", "about_story", "chat", "cast_lines") else 1.0)

    def batch(self, rows):
        return tuple(np.stack(part) for part in zip(*(next(self.rows) for _ in range(rows)), strict=True))


@torch.no_grad()
def recall_accuracy(model, tokenizer, count, stories, seed=7, rows=24):
    """How often the thing is the likeliest token after '<name> has the', teacher-forced."""
    rng, right, total = random.Random(seed), 0, 0
    for _ in range(rows):
        ids, weight = documents.encode(tokenizer, skills.recall(rng, count, stories, asked=4))
        size = -len(ids) % model.cfg["chunk_size"]
        ids = np.concatenate([ids, np.zeros(size, ids.dtype)])
        first = torch.zeros(1, len(ids), dtype=torch.bool)
        first[0, 0] = True
        x = torch.tensor(ids)[None]
        guess = model.lm_head(model.hidden(x, first))[0].argmax(-1)
        things = {tokenizer.token_to_id("Ġ" + w) for w in words.THINGS}
        at = [i for i in np.flatnonzero(weight >= 1.0) if ids[i] in things]
        right += sum(int(guess[i - 1]) == ids[i] for i in at)
        total += len(at)
    return float(right / max(total, 1))


@torch.no_grad()
def kept(model, batch):
    """The mean probability of words that must agree with earlier ones: names and things said again."""
    ids, first, weight = (torch.as_tensor(t) for t in batch)
    p = model.lm_head(model.hidden(ids, first))[:, :-1].softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return float(p[(weight[:, 1:] - skills.KEPT).abs() < 1e-6].mean())


@torch.no_grad()
def drafts_agree(model, batch):
    """The share of positions of real text where the MTP head's first choice is the trunk's."""
    ids, first, weight = (torch.as_tensor(t) for t in batch)
    h = model.hidden(ids, first)
    trunk = model.lm_head(h).argmax(-1)[:, 1:]
    draft = model.lm_head(model.draft(h, ids, first)).argmax(-1)
    keep = (weight[:, 1:] > 0) & ~first[:, 1:]
    keep[:, :-1] &= ~first[:, 2:]
    keep[:, -1] = False
    return float((trunk == draft)[keep].float().mean())


class Trainer:
    def __init__(self, model, tokenizer, args):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        muon, adam = split_parameters(model)
        self.muon, self.adam = Muon(muon), torch.optim.Adam(adam, betas=(0.9, 0.97))
        self.average = Average(model, args.average)
        self.stage, self.step, self.tokens, self.seconds, self.age = args.stage, 0, 0, 0.0, 0
        path = Path(args.init or "") / "training.json"
        self.before = json.loads(path.read_text()).get("runs", []) if args.init and path.exists() else []
        self.last_mtp, self.ramping = 0.0, args.stage != "world"
        self.log = open(Path(args.work) / "log.jsonl", "a")  # noqa: SIM115 (lives as long as the run)

    def learn(self, batch, rate):
        """One step at `rate` (1 is Muon 0.02 and Adam 3e-3)."""
        begun = time.perf_counter()
        self.age += 1
        rate *= min(1.0, self.age / 20)
        for group in self.muon.param_groups:
            group["lr"] = 0.02 * rate
        for group in self.adam.param_groups:
            group["lr"] = 3e-3 * rate
        ids, first, weight = (torch.as_tensor(t) for t in batch)
        both = self.step % MTP_EVERY == 0
        main, mtp = self.model.losses(ids, first, weight, both)
        moes = self.model.moes() if both else self.model.moes()[:-1]
        loss = main + AUX_WEIGHT * sum(m.aux for m in moes)
        if both:
            loss = loss + MTP_WEIGHT * mtp
            self.last_mtp = float(mtp.detach())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        self.muon.step()
        self.adam.step()
        self.muon.zero_grad()
        self.adam.zero_grad()
        worst = 0.0
        for m in moes:
            load = m.load.float()
            m.bias += max(0.002, 0.02 * (1 - self.age / 250)) * (load.mean() - load).sign()
            worst = max(worst, float(load.max() / load.mean()))
        self.average.update(self.model)
        self.step += 1
        self.tokens += ids.numel()
        self.seconds += time.perf_counter() - begun
        return float(main.detach()), self.last_mtp, worst

    def say(self, **facts):
        line = {
            "stage": self.stage,
            "step": self.step,
            "tokens": self.tokens,
            "minutes": round(self.seconds / 60, 2),
            **{k: round(v, 4) if isinstance(v, float) else v for k, v in facts.items()},
        }
        self.log.write(json.dumps(line) + "\n")
        self.log.flush()
        print(line, flush=True)

    def save(self):
        state = {
            "model": self.model.state_dict(),
            "average": self.average.values,
            "seen": self.average.seen,
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "stage": self.stage,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "age": self.age,
        }
        path = Path(self.args.work) / "last.pt"
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)

    def resume(self):
        path = Path(self.args.work) / "last.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.values, self.average.seen = state["average"], state["seen"]
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        for name in ("stage", "step", "tokens", "seconds", "age"):
            setattr(self, name, state[name])
        return True

    def record(self):
        """What this run did, after the runs that made the weights it began with (kept in training.json)."""
        run = {
            "tool": "tools/train_tiny.py",
            "seed": self.args.seed,
            "began_in_stage": self.args.stage,
            "stage": self.stage,
            "steps": self.step,
            "tokens": self.tokens,
            "minutes": round(self.seconds / 60, 1),
            "batch_tokens": self.args.batch,
            "row_tokens": self.args.length,
            "threads": self.args.threads,
            "rate": self.args.rate,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        runs = [*self.before, run]
        return {**{key: round(sum(r[key] for r in runs), 1) for key in ("tokens", "minutes")}, "runs": runs}

    def export(self):
        model = TinyModel(self.model.cfg)
        model.load_state_dict(self.average.values)
        write_checkpoint(Path(self.args.work) / "export", model, self.tokenizer, self.record())
        return model

    def evaluate(self):
        model = TinyModel(self.model.cfg)
        model.load_state_dict(self.average.values)
        near, far = (recall_accuracy(model, self.tokenizer, 8, n) for n in (0, 1))
        batch = self.held_out
        ids, first, weight = (torch.as_tensor(t) for t in batch)
        with torch.no_grad():
            main, mtp = model.losses(ids, first, (weight > 0).float())
        keeping = kept(model, batch)
        self.say(
            kept=keeping,
            recall8=near,
            recall8_far=far,
            held_out=float(main),
            held_out_mtp=float(mtp),
            agree=drafts_agree(model, batch),
        )
        return min(near, keeping + 0.1)

    def run(self):
        args = self.args
        end = time.perf_counter() + 60 * args.minutes
        held = Mixed(self.tokenizer, args.seed + 1000, args.length)
        held.share = 0.0
        self.held_out = held.batch(8)
        if self.stage == "pairs":
            self.pairs(end)
        if self.stage == "skills":
            self.skills(end)
        self.world(end)
        self.evaluate()
        self.save()
        self.export()

    def pairs(self, end):
        source, mean = Pairs(self.tokenizer, self.args.seed), 4.0
        while time.perf_counter() < end:
            main, mtp, load = self.learn(source.batch(self.args.batch // 64), 1.0)
            mean += 0.1 * (main - mean)
            if self.step % 20 == 0:
                self.say(loss=mean, mtp=mtp, load=load, pairs=source.count)
            if mean < (0.25 if source.count == 8 else 0.8):
                if source.count == 8:
                    break
                source.count, mean = source.count * 2, 4.0
        self.stage, self.age = "skills", 0
        self.save()
        self.export()

    def skills(self, end):
        source = Mixed(self.tokenizer, self.args.seed + 1 + self.step, self.args.length)
        checked, dense = self.step, Pairs(self.tokenizer, self.args.seed + 3 + self.step)
        while time.perf_counter() < end:
            if self.step % 3 == 1:  # the first stage's rows go on, so that nothing of it is lost
                dense.count = random.choice((2, 4, 8))
                main, _, _ = self.learn(dense.batch(self.args.batch // 64), 0.7)
                if self.step % 30 == 2:
                    self.say(dense=main)
            main, mtp, load = self.learn(source.batch(self.args.batch // self.args.length), 0.7)
            if self.step % 20 == 0:
                self.say(loss=main, mtp=mtp, load=load)
            if self.step - checked >= 100:
                checked = self.step
                self.save()
                if self.evaluate() >= 0.95:
                    break
        self.stage, self.age = "world", 0
        self.save()
        self.export()

    def world(self, end):
        source = Mixed(self.tokenizer, self.args.seed + 2 + self.step, self.args.length)
        begun = saved = time.perf_counter()
        while time.perf_counter() < end:
            done = (time.perf_counter() - begun) / (end - begun)
            source.share = max(0.0, 0.8 - self.age / self.args.ramp) if self.ramping else 0.0
            rate = self.args.rate * (1 - 0.95 * done)
            main, mtp, load = self.learn(source.batch(self.args.batch // self.args.length), rate)
            if self.step % 20 == 0:
                self.say(loss=main, mtp=mtp, load=load, rate=rate)
            if time.perf_counter() - saved > 60 * self.args.save_every:
                self.evaluate()
                self.save()
                self.export()
                saved = time.perf_counter()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", required=True, help="directory for checkpoints, outside the repository")
    parser.add_argument("--minutes", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", help="directory of exported weights to start from")
    parser.add_argument("--stage", choices=("pairs", "skills", "world"), help="where to begin")
    parser.add_argument("--batch", type=int, default=1920, help="tokens a step")
    parser.add_argument("--length", type=int, default=384, help="tokens a row")
    parser.add_argument(
        "--rate", type=float, default=0.5, help="learning rate of the last stage, in units of 0.02"
    )
    parser.add_argument("--ramp", type=int, default=300, help="steps over which skills give way to the world")
    parser.add_argument("--average", type=float, default=0.99)
    parser.add_argument("--save-every", type=float, default=4.0, help="minutes between checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.stage = args.stage or ("world" if args.init else "pairs")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    path = work / "tokenizer.json"
    if not path.exists():
        tiny_tokenizer.train(CONFIG["vocab_size"], args.seed).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    model = (
        read_checkpoint(args.init, tokenizer)
        if args.init
        else TinyModel({**CONFIG, "vocab_size": tokenizer.get_vocab_size()})
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    trainer = Trainer(model, tokenizer, args)
    if trainer.resume():
        print("resumed at step", trainer.step, flush=True)
    trainer.run()


if __name__ == "__main__":
    main()
