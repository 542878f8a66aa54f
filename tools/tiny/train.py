"""Train the embedded model, from random weights to the files of the package:

    python -m tools.tiny.train --seed 1 --out DIR        (--resume continues a killed run, to the same bits)

Stages have fixed numbers of steps, whatever the time or the accuracy (docs/lab-notes.md has their reasons):

    pairs    dense rows: name thing name thing ..., then the names again, each with its thing; 2, 4, 8 pairs,
             then any symbols, copying, and names after their verbs
    skills   recall, copying, counting and sums in words, lines about one cast, chats; dense rows continue
    world    stories and chats, with skills mixed in; the experts are balanced within each row of text; the
             learning rate falls to a twentieth

DIR receives the package's files, the card with its figures, the curves and the samples; DIR/run receives the
log and the state of the run. Two processes of one thread each train together: a step takes the mean of their
gradients.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from . import ranks as processes
from . import tokenizer as tiny_tokenizer
from .accuracy import drafts_agree, kept, recall_accuracy
from .card import curve, write_text
from .checkpoint import CONFIG, PACKAGED, read_checkpoint, write_checkpoint
from .model import TinyModel
from .optim import Optimizer
from .rows import Pairs, Rows

__all__ = ["CONFIG", "Pairs", "Plan", "Trainer", "read_checkpoint", "main"]
MTP_WEIGHT, AUX_WEIGHT = 0.3, 3e-3
AUX_BY_ROW = 1e-2  # in the last stage
MTP_EVERY = 2  # the MTP head is trained on every second step, because it costs a third of a step
LOG_EVERY, SAVE_EVERY, PROBE_EVERY = 20, 100, 500
STAGES = (700, 900, 5300)


@dataclass(frozen=True)
class Plan:
    """The stages in steps, and the settings of each step, which depend only on its number."""

    pairs: int
    skills: int
    world: int

    @property
    def steps(self):
        """Return the number of steps of the whole run."""
        return self.pairs + self.skills + self.world

    def stage(self, step):
        """Return (stage, steps since it began)."""
        for name in ("pairs", "skills", "world"):
            if step < getattr(self, name) or name == "world":
                return name, step
            step -= getattr(self, name)

    def rate(self, step):
        """Return the learning rate in units of (Muon 0.02, Adam 3e-3), with 20 steps of warm-up."""
        name, age = self.stage(step)
        if name == "world":
            return 0.5 * (1 - 0.95 * age / self.world)
        return (1.0 if name == "pairs" else 0.7) * min(1.0, (step + 1) / 20)

    def dense(self, step):
        """Return (pairs, names only) if a step reads dense rows, else None; pairs None: a random count."""
        name, age = self.stage(step)
        if name == "pairs":  # only names until the model can look one up, then all kinds of rows
            done = age / self.pairs
            return (2 if done < 0.15 else 4 if done < 0.25 else 8 if done < 0.35 else None), done < 0.35
        return (None, False) if age % (4 if name == "skills" else 20) == 1 else None

    def share(self, step):
        """Return the share of skills among the documents of a step: 1, then falling over 600 steps."""
        name, age = self.stage(step - step % Rows.BLOCK)
        return 1.0 if name != "world" else max(0.0, round(0.7 * (1 - age / min(600, self.world)), 3))

    def bias_step(self, step):
        """Return the change of the selection biases of the experts in a step."""
        return max(0.001, 0.02 * (1 - self.stage(step)[1] / 250))


class Trainer:
    """A model, its optimizer and its position in a plan; every rank has one, with the same values."""

    def __init__(
        self,
        model,
        tokenizer,
        plan,
        out,
        seed=1,
        ranks=None,
        tokens=2048,
        length=512,
        average=0.99,
        save_every=SAVE_EVERY,
    ):
        self.model, self.tokenizer, self.plan, self.out, self.seed = model, tokenizer, plan, Path(out), seed
        self.ranks, self.save_every = ranks or processes.Ranks(), save_every
        self.optimizer = Optimizer(model, self.ranks, average)
        self.rows = Rows(tokenizer, seed, self.ranks.rank, tokens, length)
        self.step, self.tokens, self.seconds, self.mtp_loss = 0, 0, 0.0, 0.0

    def batch(self):
        """Return (ids, first, weight) of this step for this rank."""
        dense = self.plan.dense(self.step)
        return (
            self.rows.dense(self.step, *dense)
            if dense
            else self.rows.documents(self.step, self.plan.share(self.step))
        )

    def learn(self, batch):
        """Take one step; return the trunk's loss on this rank's rows, and the largest load of an expert."""
        begun, head = time.perf_counter(), self.step % MTP_EVERY == 0
        last = self.plan.stage(self.step)[0] == "world"
        for m in self.model.moes():
            m.by_row = last
        ids, first, weight = (torch.as_tensor(t) for t in batch)
        main, mtp = self.model.losses(ids, first, weight, head)
        moes = self.model.moes() if head else self.model.moes()[:-1]
        loss = main + (AUX_BY_ROW if last else AUX_WEIGHT) * sum(m.aux for m in moes)
        if head:
            loss = loss + MTP_WEIGHT * mtp
            self.mtp_loss = float(mtp.detach())
        loss.backward()
        rate = self.plan.rate(self.step)
        self.optimizer.step(0.02 * rate, 3e-3 * rate, head)
        load = torch.stack([m.load.float() for m in moes])
        self.ranks.mean(load.view(-1))
        mean = load.mean(1, keepdim=True)
        for m, row in zip(moes, (mean - load).sign() * self.plan.bias_step(self.step), strict=True):
            m.bias += row
        self.step += 1
        self.tokens += ids.numel() * self.ranks.size
        self.seconds += time.perf_counter() - begun
        return float(main.detach()), float((load / mean).max())

    def run(self):
        """Train to the end of the plan; write the log and the state at intervals."""
        losses = []
        while self.step < self.plan.steps:
            begun = time.perf_counter()
            batch = self.batch()
            self.seconds += time.perf_counter() - begun
            loss, load = self.learn(batch)
            losses.append(loss)
            if self.step % LOG_EVERY == 0 or self.step == self.plan.steps:
                self.write(loss=sum(losses) / len(losses), mtp=self.mtp_loss, load=load)
                losses = []
            if self.step % PROBE_EVERY == 0:
                self.probe()
            if self.step % self.save_every == 0 or self.step == self.plan.steps:
                self.save()
                losses = []

    def write(self, **facts):
        """Add a line to the log, on rank 0."""
        if self.ranks.rank:
            return
        line = {"step": self.step, "stage": self.plan.stage(self.step - 1)[0], "tokens": self.tokens}
        line |= {name: round(value, 4) for name, value in facts.items()}
        line["minutes"] = round(self.seconds / 60, 2)
        with open(self.out / "run" / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
        print(line, flush=True)

    @torch.no_grad()
    def probe(self):
        """Log recall, words kept, held-out losses and the drafts' agreement, of the averaged weights."""
        if self.ranks.rank:
            return
        begun = time.perf_counter()
        values = self.optimizer.use_average()
        held = Rows(self.tokenizer, self.seed + 1000, 0, 4 * self.rows.length, self.rows.length)
        batch = held.documents(0, 0.0)
        ids, first, weight = (torch.as_tensor(t) for t in batch)
        main, mtp = self.model.losses(ids, first, (weight > 0).float())
        self.optimizer.values.copy_(values)
        facts = {"held_out": float(main), "held_out_mtp": float(mtp), "kept": kept(self.model, batch)}
        facts |= {"agree": drafts_agree(self.model, batch)}
        facts |= {"recall8": recall_accuracy(self.model, self.tokenizer, 8, 0, rows=8)}
        self.seconds += time.perf_counter() - begun
        self.write(**facts)

    def save(self):
        """Write the state of the run, on rank 0; it replaces the previous file once it is complete."""
        self.ranks.wait()  # a barrier: it changes the seconds that a rank counts, not the bits
        if self.ranks.rank:
            return
        state = {"optimizer": self.optimizer.state(), "step": self.step, "tokens": self.tokens}
        state |= {"seconds": self.seconds, "mtp_loss": self.mtp_loss, "seed": self.seed}
        state |= {"plan": (self.plan.pairs, self.plan.skills, self.plan.world)}
        state["biases"] = [m.bias for m in self.model.moes()]
        path = self.out / "run" / "state.pt"
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)

    def resume(self):
        """Load the state of DIR/run and cut the log at its step; return False if there is no state."""
        path = self.out / "run" / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        plan = (self.plan.pairs, self.plan.skills, self.plan.world)
        if (state["seed"], tuple(state["plan"])) != (self.seed, plan):
            raise SystemExit(f"{path} is of --seed {state['seed']} and --stages {state['plan']}")
        self.optimizer.restore(state["optimizer"])
        for m, bias in zip(self.model.moes(), state["biases"], strict=True):
            m.bias.copy_(bias)
        for name in ("step", "tokens", "seconds", "mtp_loss"):
            setattr(self, name, state[name])
        if self.ranks.rank == 0:
            log = self.out / "run" / "log.jsonl"
            lines = log.read_text().splitlines(keepends=True) if log.exists() else []
            log.write_text("".join(line for line in lines if json.loads(line)["step"] <= self.step))
        return True

    def record(self):
        """Return the contents of training.json."""
        return {
            "tool": "python -m tools.tiny.train",
            "seed": self.seed,
            "steps": {name: getattr(self.plan, name) for name in ("pairs", "skills", "world")},
            "tokens": self.tokens,
            "minutes": round(self.seconds / 60, 1),
            "processes": self.ranks.size,
            "tokens_per_step": self.ranks.size * self.rows.tokens,
            "tokens_per_row": self.rows.length,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }

    def export(self):
        """Write the files of the package from the averaged weights, with the log and its curves."""
        values = self.optimizer.use_average()
        write_checkpoint(self.out, self.model, self.tokenizer, self.record())
        self.optimizer.values.copy_(values)
        if self.out.resolve() != PACKAGED.resolve():
            shutil.copy(PACKAGED / "chat_template.jinja", self.out)
        lines = [json.loads(line) for line in (self.out / "run" / "log.jsonl").read_text().splitlines()]
        (self.out / "curve.svg").write_text(curve(lines))
        (self.out / "README.md").write_text(write_text(self.model, self.record(), lines))


def work(ranks, args, cfg):
    """Train on one rank; rank 0 exports the result."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer.from_file(str(Path(args.out) / "run" / "tokenizer.json"))
    model = TinyModel({**cfg, "vocab_size": tokenizer.get_vocab_size()})
    options = {"tokens": args.tokens, "length": args.length, "save_every": args.save_every}
    trainer = Trainer(model, tokenizer, Plan(*args.stages), args.out, args.seed, ranks, **options)
    if args.resume and trainer.resume() and ranks.rank == 0:
        print("resumed at step", trainer.step, flush=True)
    trainer.run()
    if ranks.rank == 0:
        trainer.export()


def stages(text):
    """Return the steps of the three stages, parsed from 'PAIRS,SKILLS,WORLD'."""
    numbers = tuple(int(part) for part in text.split(","))
    if len(numbers) != 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError("three numbers of steps, as in 500,900,5600")
    return numbers


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", required=True, help="directory of the package's files, outside the repository"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out after a kill")
    parser.add_argument("--stages", type=stages, default=STAGES, help="steps of pairs,skills,world")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a step and process")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--save-every", type=int, default=SAVE_EVERY, help="steps between states of the run")
    parser.add_argument("--config", help="a JSON file of config fields to change (for tests)")
    parser.add_argument("--documents", type=int, default=6000, help="documents to train the tokenizer on")
    parser.add_argument(
        "--figures", type=float, default=1.0, help="scales the evaluation (for tests; 0: none)"
    )
    args = parser.parse_args()
    run = Path(args.out) / "run"
    if (run / "state.pt").exists() and not args.resume:
        parser.error(f"{args.out} holds a run: --resume goes on with it")
    run.mkdir(parents=True, exist_ok=True)
    cfg = CONFIG | (json.loads(Path(args.config).read_text()) if args.config else {})
    if not (run / "tokenizer.json").exists():
        tiny_tokenizer.train(cfg["vocab_size"], args.seed, args.documents).save(
            str(run / "tokenizer.json.part")
        )
        (run / "tokenizer.json.part").rename(run / "tokenizer.json")
    if not args.resume:
        (run / "log.jsonl").write_text("")
    count = sum(p.numel() for p in TinyModel(cfg).parameters())
    print(f"{count:,} parameters, {sum(args.stages):,} steps", flush=True)
    processes.run(args.processes, count, work, args, cfg)
    if args.figures:
        tool = [sys.executable, "-m", "tools.tiny.evaluate", "--model", args.out, "--size", str(args.figures)]
        more = ["--card", f"{args.out}/README.md", "--samples", f"{args.out}/samples.md"]
        subprocess.run([*tool, *more], check=True)


if __name__ == "__main__":
    main()
