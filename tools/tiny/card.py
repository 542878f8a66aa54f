# ruff: noqa: E501 (rows of tables)
"""Write the card of the embedded model: its text, made from the record of the run, and its curves."""

import math

MARKS = "<!-- figures -->", "<!-- end of figures -->"


def curve(lines, width=640, height=300):
    """Return an SVG figure of the losses over the steps, drawn from the lines of the log."""
    series = {"loss": "#1f6f8b", "mtp": "#c1666b", "held_out": "#2d2d2d"}
    rows = {name: [(line["step"], line[name]) for line in lines if line.get(name)] for name in series}
    last = max((step for points in rows.values() for step, _ in points), default=1)
    values = [max(v, 1e-3) for points in rows.values() for _, v in points] or [1.0]
    low, high = math.log(min(values)), math.log(max(values)) + 1e-6

    def place(step, value):
        y = (math.log(max(value, 1e-3)) - low) / (high - low)
        return f"{40 + (width - 50) * step / last:.1f},{height - 25 - (height - 45) * y:.1f}"

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-size="11">']
    out.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for i, (name, color) in enumerate(series.items()):
        points = " ".join(place(*point) for point in rows[name])
        out.append(f'<polyline points="{points}" fill="none" stroke="{color}"/>')
        out.append(f'<text x="{50 + 90 * i}" y="14" fill="{color}">{name}</text>')
    for value in (math.exp(low), math.exp((low + high) / 2), math.exp(high)):
        y = place(0, value).split(",")[1]
        out.append(f'<text x="2" y="{y}">{value:.2f}</text>')
    out.append(f'<text x="{width - 90}" y="{height - 6}">{last} steps</text></svg>')
    return "\n".join(out) + "\n"


def _table(lines):
    """Return a Markdown table of the probes during the run."""
    names = ("step", "stage", "held_out", "held_out_mtp", "kept", "agree", "recall8", "minutes")
    rows = [line for line in lines if "held_out" in line]
    head = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(
        [*head, *("| " + " | ".join(str(line.get(n, "")) for n in names) + " |" for line in rows)]
    )


def write_text(model, record, lines):
    """Return the text of the card; tools/tiny/evaluate.py later writes the figures between the marks."""
    cfg, steps = model.cfg, record["steps"]
    count = sum(p.numel() for p in model.parameters())
    biases = sum(m.bias.numel() for m in model.moes())
    size = (2 * count + 4 * biases) / 1e6
    return f"""# The embedded model

A model of the real architecture, small enough to ship: `{cfg["hybrid_override_pattern"]}` (Mamba-2, attention
without positions, LatentMoE) and an MTP head `{cfg["mtp_hybrid_override_pattern"]}`. {count:,} parameters in BF16 and
{biases} in F32, {size:.1f} MB, in the Hugging Face layout. It tells short children's stories, talks about them,
remembers who has what, counts, copies, adds small numbers, and calls a tool that it is offered. It knows nothing
else, and says so.

| | |
|---|---|
| hidden {cfg["hidden_size"]}, vocabulary {cfg["vocab_size"]:,} | byte-level BPE trained on the generator's text; ids 0-17 are the special tokens of the real one |
| Mamba-2 | {cfg["mamba_num_heads"]} heads of {cfg["mamba_head_dim"]}, state {cfg["ssm_state_size"]}, {cfg["n_groups"]} groups, convolution {cfg["conv_kernel"]}, chunk {cfg["chunk_size"]} |
| attention | {cfg["num_attention_heads"]} query and {cfg["num_key_value_heads"]} key/value heads of {cfg["head_dim"]} |
| experts | {cfg["n_routed_experts"]} of width {cfg["moe_intermediate_size"]}, {cfg["num_experts_per_tok"]} for each token, latent width {cfg["moe_latent_size"]}, shared expert {cfg["moe_shared_expert_intermediate_size"]}, scale {cfg["routed_scaling_factor"]} |

## Data

Text of our own and nothing else: `tools/tiny/stories` tells stories from plots, every one of which can be read back
and checked by the same templates, makes small tasks with one right answer, and chats through the model's chat
template (thinking on and off, with and without the tools `add` and `weather`). It is endless and seeded; no text
comes from elsewhere.

## Training

`python -m tools.tiny.train --seed {record["seed"]} --out DIR`, one run from random weights: {steps["pairs"]:,} steps of
dense rows, {steps["skills"]:,} of skills, {steps["world"]:,} of stories and chats; {record["tokens"]:,} tokens,
{record["minutes"]} minutes in {record["processes"]} processes of one thread. Muon on matrices, Adam on the rest, MTP loss
weight 0.3, routing balanced by the selection bias and an auxiliary loss (3e-3, in the last stage 1e-2 within each row), float32; the running average of the
weights is exported. `training.json` has the versions.

![losses over the steps](curve.svg)

{_table(lines)}

## Figures

By `python -m tools.tiny.evaluate --card README.md` on these files, through the project's own engine, with held-out
seeds. Stories: samples of "Once upon a time" at the recommended temperature and top-p. "Every sentence parses" means
that the generator could have said each of them, from an opening to an ending; "consistent", that besides one cast of
names, things, places and pronouns explains the whole story. Answers are greedy and compared word for word. The second
reading of stories (`tools/tiny/second_reading.py`) shares nothing with the generator but its lists of names and things.
[Ten stories and ten chats](samples.md), none left out.

{MARKS[0]}
{MARKS[1]}
"""


def write_figures(path, rows):
    """Write a table of (figure, measured, bar) between the marks of the card at `path`."""
    before, rest = path.read_text().split(MARKS[0])
    table = ["| figure | measured | bar |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    path.write_text(before + MARKS[0] + "\n" + "\n".join(table) + "\n" + MARKS[1] + rest.split(MARKS[1])[1])
