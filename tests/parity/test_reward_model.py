"""A random small reward model, written by transformers and read here: the same chat text, the same tokens, the same rewards."""

import json

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from plasticity_jax.evaluate.reward_model import open_reward_model
from plasticity_jax.model.forward import Forward
from plasticity_jax.model.scalar_head import length_buckets, score_rows

pytestmark = pytest.mark.parity

SPECIALS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "[PAD]"}
HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
# Of the kind that Llama 3.1's is: a system header with dates, tools that are not there, trimmed contents.
TEMPLATE = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- raise_exception("no tools here") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
PAIRS = [
    ("What is 7 x 8?", " 7 x 8 = 56.\nThe answer is 56."),
    ("Say nothing.", ""),
    ("  naïve café ☕ 漢字\n\n", " It spells <|eot_id|> itself, and {{ messages }} too."),
    ("Which?\nA. one\nB. two", " The answer is B. " * 12),
]


@pytest.fixture(scope="module", params=["whole", "sharded"])
def folder(request, tmp_path_factory):
    """The model and its tokenizer as transformers saves them, in one file or several."""
    folder = tmp_path_factory.mktemp("hf") / "reward"
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=[*SPECIALS.values(), *HEADERS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["The answer is 56. Cutting Knowledge Date: December 2023 Today Date:"] * 20, trainer)
    backend.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **SPECIALS)
    config = transformers.LlamaConfig(
        vocab_size=330, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, num_labels=1,
        pad_token_id=tokenizer.pad_token_id, max_position_embeddings=512,
        rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32},
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape) if parameter.ndim == 1 else 4 * parameter)
    model.save_pretrained(folder, max_shard_size="50KB" if request.param == "sharded" else "5GB")
    tokenizer.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file() is (request.param == "sharded")
    return folder


def chats(pairs):
    return [[{"role": "user", "content": problem}, {"role": "assistant", "content": completion}] for problem, completion in pairs]


def test_text_and_tokens_are_those_of_transformers(folder):
    """Also those of the model card: the rendered text without its beginning of text, to which the tokenizer adds one."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    _, chat = open_reward_model(folder)
    rows, n_cut = chat.rows(PAIRS, 512)
    doubled, _ = chat.rows(PAIRS, 8, faithful=True)
    assert n_cut == 0 and doubled == [tokenizer(text)["input_ids"] for text in tokenizer.apply_chat_template(chats(PAIRS), tokenize=False)]
    assert doubled == [row[:1] + row for row in rows]
    for (problem, completion), conversation, row in zip(PAIRS, chats(PAIRS), rows, strict=True):
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        assert chat.text(problem, completion) == text
        assert row == tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"]
        assert row == tokenizer(text.removeprefix(tokenizer.bos_token))["input_ids"]


def test_rewards_are_those_of_transformers(folder):
    """Of a batch of different lengths, padded as each pads it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer.apply_chat_template(chats(PAIRS), return_tensors="pt", padding=True, return_dict=True)
    with torch.no_grad():
        expected = theirs(**inputs).logits[:, 0].numpy()
    model, chat = open_reward_model(folder)
    rows, _ = chat.rows(PAIRS, 512)
    assert len({len(row) for row in rows}) == len(rows) and max(map(len, rows)) > 64
    found = score_rows(model, rows, buckets=length_buckets(512), batch_size=3, forward=Forward("float32"), what="parity")
    assert np.max(np.abs(found - expected)) < 1e-4 * np.max(np.abs(expected))
    assert np.std(expected) > 0.01 * np.max(np.abs(expected)), "all rewards are the same, so nothing is compared"


def test_padding_tokens_at_the_end_of_a_text_are_skipped_as_transformers_skips_them(folder, tmp_path):
    """With the end of turn as padding, the reward is read at the last token before it."""
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in folder.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    settings = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(settings | {"pad_token_id": 1}))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(changed, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(changed)
    model, chat = open_reward_model(changed)
    rows, _ = chat.rows(PAIRS, 512)
    found = score_rows(model, rows, buckets=length_buckets(512), batch_size=4, forward=Forward("float32"), what="parity")
    with torch.no_grad():
        expected = [
            theirs(**tokenizer.apply_chat_template(chat_, return_tensors="pt", return_dict=True)).logits[0, 0].item() for chat_ in chats(PAIRS)
        ]
    assert np.max(np.abs(found - expected)) < 1e-4 * np.max(np.abs(expected))
