"""Writes tests/fixtures/hf_greedy.json: how transformers continues some prompts with the models of tests/fixtures/hf.

Run with an interpreter that has torch and transformers (made with torch 2.13.0, transformers 5.23.0, CPU, float32):

    HF_HUB_OFFLINE=1 python scripts/make_hf_greedy_reference.py

Of each model: prompts of token ids, their likeliest continuations, and by how much the likeliest token of a step led
at least. The end of text does not end them, so that all have the same length.

    HF_HUB_OFFLINE=1 python scripts/make_hf_greedy_reference.py --text FOLDER PROMPT...

prints the continuation of each prompt by the model and the tokenizer in a folder, as `axlearn convert hf export`
makes it, to be compared with what `axlearn generate RUN --temperature 0 --max_tokens 40` prints.
"""

import argparse
import json
import pathlib

import torch
import transformers

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "tests" / "fixtures"
NUM_TOKENS = 40
# Of different lengths, one of them longer than the windows of the models that have some.
PROMPTS = [[1], [1, 17, 4, 55, 23], [1, *range(40, 60)]]


def continue_ids(model: transformers.PreTrainedModel, prompt: list[int]) -> tuple[list[int], float]:
    """Returns the ids that follow a prompt, and the smallest lead of a likeliest token in logits."""
    output = model.generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=NUM_TOKENS,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = [logits[0].float().topk(2).values.tolist() for logits in output.logits]
    return output.sequences[0, len(prompt) :].tolist(), min(first - second for first, second in best)


def write_fixtures() -> None:
    """Writes the continuations of all models."""
    continuations = {}
    for folder in sorted((FIXTURES / "hf").iterdir()):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        rows = []
        for prompt in PROMPTS:
            ids, lead = continue_ids(model, prompt)
            rows.append({"prompt": prompt, "continuation": ids, "smallest_lead": round(lead, 6)})
        continuations[folder.name] = rows
        print(folder.name, [(len(set(row["continuation"])), row["smallest_lead"]) for row in rows])
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(rows)}" for name, rows in continuations.items())
    (FIXTURES / "hf_greedy.json").write_text(f"{{\n{lines}\n}}\n")


def print_texts(folder: pathlib.Path, prompts: list[str]) -> None:
    """Prints the continuations of some texts."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=NUM_TOKENS)
        print(tokenizer.decode(ids[0], skip_special_tokens=True))


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", nargs="+", metavar=("FOLDER", "PROMPT"), help="print texts instead")
    args = parser.parse_args()
    if args.text:
        print_texts(pathlib.Path(args.text[0]), args.text[1:])
    else:
        write_fixtures()


if __name__ == "__main__":
    main()
