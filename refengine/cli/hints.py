"""Options and commands of other engines, and their equivalents here."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import click
from click.core import ParameterSource

OPTIONS = {  # of llama.cpp, transformers, vLLM and Ollama
    "-n/--max-tokens N": "--n-predict --predict --num-predict --max-new-tokens --max_new_tokens --max_tokens "
    "--max-length --num_predict",
    "--temperature T": "--temp",
    "--top-k K": "--top_k",
    "--top-p P": "--top_p",
    "--min-p P": "--min_p",
    "--repetition-penalty R": "--repeat-penalty --repeat_penalty --repetition_penalty",
    "--stop TEXT": "--reverse-prompt --stop-strings -r",
    "-m/--model MODEL": "--hf-repo --model-path --model_path --model-id --model_name_or_path "
    "--model-name-or-path --pretrained --hf-file -hf",
    "-f/--file FILE": "--prompt-file --input-file",
    "-p/--prompt TEXT, or --prompts FILE for several": "--input --text",
    "--tp N": "--tensor-parallel-size --tp-size --tensor-split --split-mode -tp -sm -ts",
    "--pp N": "--pipeline-parallel-size --pp-size -pp",
    "--ep N": "--enable-expert-parallel --expert-parallel-size --ep-size",
    "--dtype": "--torch-dtype --torch_dtype --precision --data-type",
    "--device cuda:N": "--main-gpu --device-map --device_map --gpu -mg",
    "--backend cuda (or --backend torch --device cuda), for the whole model": "--n-gpu-layers "
    "--gpu-layers --num-gpu --num_gpu -ngl",
    "--threads N": "--num-threads --num_thread --threads-batch --cpu-threads -tb",
    "--system TEXT": "--system-prompt --system_prompt --system-prompt-file -sys -sysf",
    "--template NAME": "--chat-template --chat-template-file --chat_template --jinja",
    "--thinking on|off": "--think --enable-thinking --enable_thinking --reasoning --reasoning-format",
    "--no-thinking": "--nothink --no-think --disable-thinking",
    "--show-thinking": "--hidethinking",
    "--tools FILE": "--tool-call-parser --enable-auto-tool-choice --functions",
    "--no-echo": "--no-display-prompt",
    "the command chat": "--interactive --conversation --interactive-first -i -cnv -if",
    "--stats": "--show-timings --perf --timings --metrics",
    "--json": "--output-format --format --json-output",
    "--prompts FILE": "--prompts-file",
    "--save-state F, and --load-state F": "--prompt-cache --prompt-cache-all --slot-save-path",
    "--cache BYTES": "--enable-prefix-caching --cache-reuse --cache-prompt",
    "--batch N": "--parallel --max-num-seqs --max-batch-size",
    "nothing: the context is the model's own, and memory grows with the text": "--ctx-size --context-size "
    "--max-model-len --max-seq-len --num-ctx --num_ctx -c",
    "nothing: how weights are stored is read from the files": "--quantization --quantize --load-in-4bit "
    "--load-in-8bit --load-format --load_in_4bit --load_in_8bit",
    "nothing: nothing is run from a checkpoint": "--trust-remote-code --trust_remote_code",
    "nothing: tokens are sampled one by one, without beams": "--num-beams --num_beams --beam-width",
    "nothing: a prompt is read in parts of its own size": "--batch-size --ubatch-size "
    "--max-num-batched-tokens --n-batch -ub",
    "nothing: memory is used as it is needed": "--gpu-memory-utilization --cpu-offload-gb "
    "--swap-space --mlock",
    "nothing: files are memory-mapped": "--no-mmap --mmap",
}
OF_OPTION = {name: ours for ours, names in OPTIONS.items() for name in names.split()}
# A single dash and several letters: read as several short options by the parser, so looked for before it.
CLUSTERS = {name for name in OF_OPTION if not name.startswith("--") and len(name) > 2}
COMMANDS = {
    "run": "chat (to talk) or generate (to go on from a prompt)",
    "complete": "generate",
    "completions": "generate",
    "serve": "chat or generate; there is no server yet",
    "pull": "'hf download NAME' of huggingface_hub, then -m NAME",
    "download": "'hf download NAME' of huggingface_hub, then -m NAME",
    "list": "inspect",
    "show": "inspect",
    "info": "inspect",
    "perplexity": "score",
    "eval": "score",
    "benchmark": "bench",
    "encode": "tokenize",
    "decode": "tokenize --ids",
    "detokenize": "tokenize --ids",
    "version": "--version",
    "help": "--help",
}


def hint(name: str, command: click.Command | None = None) -> str:
    """Return what to give instead of an option of another engine; empty where there is nothing to say."""
    name = name.partition("=")[0]
    ours = OF_OPTION.get(name)
    if command and name == "--prompt" and command.name == "bench":
        ours = "--prompt-tokens N,N"
    if ours is None:
        return ""
    nothing, _, why = ours.partition(": ")
    return f" There is none here: {why}." if nothing == "nothing" else f" Here it is {ours}."


def with_hint(error: click.ClickException) -> click.ClickException:
    """Return an error that names our option for one of another engine, and the variable of a wrong value."""
    if type(error) is click.BadParameter:
        message = error.message
        for theirs, ours in NUMBERS.items():
            message = message.replace(theirs, ours)
        variable = variable_of(error)
        if variable and error.param:
            option = next(name for name in error.param.opts if name.startswith("--"))
            return click.UsageError(f"Invalid value of {variable} (for {option}): {message}", error.ctx)
        return click.BadParameter(message, error.ctx, error.param, error.param_hint)
    if isinstance(error, click.NoSuchOption):
        said = hint(error.option_name, error.ctx.command if error.ctx else None)
        if said:
            return click.UsageError(f"No such option {error.option_name!r}.{said}", error.ctx)
    return error


NUMBERS = {
    "is not a valid integer range": "is not a whole number",
    "is not a valid integer": "is not a whole number",
    "is not a valid float range": "is not a number",
}


def variable_of(error: click.BadParameter) -> str:
    """Return the environment variable whose value is wrong; empty where it was typed."""
    return read_from(error.param, error.ctx) if error.param and error.ctx else ""


def read_from(param: click.Parameter, context: click.Context) -> str:
    """Return the environment variable that gave the value of a parameter; empty where it was typed."""
    if context.get_parameter_source(param.name or "") is not ParameterSource.ENVIRONMENT:
        return ""
    names = param.envvar or ()
    names = [names] if isinstance(names, str) else names
    return next((name for name in names if os.environ.get(name)), "")


def naming_variables(work: Callable) -> Callable:
    """Return a command's function whose InputError names the variable of the wrong value."""
    from refengine.spec.keys import InputError

    @functools.wraps(work)
    def call(*args, **how):
        try:
            return work(*args, **how)
        except InputError as error:
            if type(error) is not InputError:  # of a rank or a prompt, with more to tell
                raise
            context, text = click.get_current_context(), str(error)
            found = [name for param in context.command.params if (name := read_from(param, context))]
            named = [name for name in found if len(os.environ[name]) > 2 and os.environ[name] in text]
            if not named:
                raise
            raise InputError(f"{text} (the value of {named[0]})") from error

    return call


def refuse_clusters(args: list[str], command: click.Command) -> None:
    """Raise a usage error for an option such as -ngl, which the parser would read as -n gl."""
    own = {opt for param in command.params for opt in param.opts}
    for arg in args:
        if arg == "--":
            return
        if arg in CLUSTERS and arg not in own:
            raise click.UsageError(f"No such option {arg!r}.{hint(arg)}")
