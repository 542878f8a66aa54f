"""Train the embedded model: `python -m tools.tiny.train --work DIR --minutes 100`.

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

import torch
from tokenizers import Tokenizer

from . import tokenizer as tiny_tokenizer
from .accuracy import drafts_agree, kept, recall_accuracy
from .checkpoint import CONFIG, read_checkpoint, write_checkpoint
from .model import TinyModel
from .optim import Average, Muon, split_parameters
from .rows import Mixed, Pairs

MTP_WEIGHT, AUX_WEIGHT = 0.3, 1e-3
MTP_EVERY = 2  # the draft head learns on every second step: it costs a third


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
            "tool": "tools/tiny/train.py",
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
