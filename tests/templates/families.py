"""The families of chat templates that TRL ships: their tokenizers' control tokens, and what their models say.

Each tokenizer is made from the family's own control tokens, special or not as in the family's tokenizer, on a small
vocabulary. What a turn must be is written down here by hand, for `templates` as a test's oracle.
"""

import importlib.util
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from chat_tokenizers import byte_level_backend, metaspace_backend
from prefloop.chat import ChatRenderer
from prefloop.records import Message, Role, ToolCall

SPEC = importlib.util.find_spec("trl")
FOLDER = Path(SPEC.submodule_search_locations[0]) / "chat_templates" if SPEC else Path("absent")
STEMS = sorted(path.stem for path in FOLDER.glob("*.jinja"))

OSLO = ToolCall("search_flights", {"city": "Oslo", "max": 12.5}, "abcdefgh1")
ROME = ToolCall("search_flights", {"city": "Rome", "max": 3}, "abcdefgh2")
TOOL = {
    "type": "function",
    "function": {
        "name": "search_flights",
        "description": "Finds flights.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "max": {"type": "number"}},
            "required": ["city"],
        },
    },
}


def _asked(text="Fly me to Oslo."):
    return Message(Role.USER, text)


def _said(text="", reasoning="", calls=()):
    return Message(Role.ASSISTANT, text, reasoning, tuple(calls))


def _found(call, text="found"):
    return Message(Role.TOOL, text, tool_call_id=call.id, name=call.name)


CASES = {
    "one turn": ((_asked(), _said("Sure.")), ()),
    "several turns": ((_asked(), _said("Sure."), _asked("More <|im_end|>"), _said("Bye")), ()),
    "thinking": ((_asked(), _said("Sure.", "Why not?"), _asked("More"), _said("Bye", "Enough.")), ()),
    "a call": ((_asked(), _said(calls=[OSLO]), _found(OSLO), _said("Bye")), (TOOL,)),
    "two calls": ((_asked(), _said(calls=[OSLO, ROME]), _found(OSLO), _found(ROME, "none"), _said("Bye")), (TOOL,)),
    "thinking and a call": (
        (_asked(), _said("", "Look it up.", [OSLO]), _found(OSLO), _said("Bye", "Enough.")),
        (TOOL,),
    ),
}


@dataclass(frozen=True)
class Family:
    """A family's tokenizer, and what its models say.

    `says` is an answer, `thinks` what stands before it where the turn has a thought and `silent` where it has none;
    `call_stop` ends a turn that calls a tool. `metaspace`: the vocabulary is SentencePiece's.
    """

    bos: str
    eos: str
    special: str
    plain: str = ""
    stop: str = ""
    call_stop: str = ""
    says: str = "{}"
    thinks: str = ""
    silent: str = ""
    one_call: str = ""
    first_call: str = ""
    between_calls: str = "\n"
    last_call: str = ""
    metaspace: bool = False
    rstrip: bool = False  # control tokens swallow the white space after them

    def turn(self, message: Message) -> str:
        """The text that the model samples for a message, its stop token included."""
        thought = self.thinks.format(message.reasoning_content) if message.reasoning_content else self.silent
        if not message.tool_calls:
            return thought + self.says.format(message.content) + (self.stop or self.eos)
        calls = self.between_calls.join(self._call(call) for call in message.tool_calls)
        return thought + self.first_call + calls + self.last_call + (self.call_stop or self.stop or self.eos)

    def _call(self, call: ToolCall) -> str:
        values = call.arguments
        return self.one_call % {"name": call.name, "json": json.dumps(values), **values}


CHATML = "<|im_start|> <|im_end|> <|endoftext|>"
VISION = "<|object_ref_start|> <|box_start|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
QWEN_TAGS = "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|>"
THINKING_TAGS = f"{QWEN_TAGS} <tool_response> </tool_response> <think> </think>"
HERMES = '<tool_call>\n{"name": "%(name)s", "arguments": %(json)s}\n</tool_call>'
XML = (
    "<tool_call>\n<function=%(name)s>\n<parameter=city>\n%(city)s\n</parameter>\n"
    "<parameter=max>\n%(max)s\n</parameter>\n</function>\n</tool_call>"
)
LLAMA = '{"name": "%(name)s", "parameters": %(json)s}'
LFM_CALL = "%(name)s(city='%(city)s', max=%(max)s)"
ATEM = (
    ' to=%(name)s<|message|><atem:function_calls>\n<atem:invoke name="%(name)s">\n<atem:parameter name="city">%(city)s'
    '</atem:parameter>\n<atem:parameter name="max">%(max)s</atem:parameter>\n</atem:invoke>\n</atem:function_calls>'
)
GEMMA_CALL = '<|tool_call>call:%(name)s{city:<|"|>%(city)s<|"|>,max:%(max)s}<tool_call|>'
GLM_CALL = (
    "<tool_call>%(name)s\n<arg_key>city</arg_key>\n<arg_value>%(city)s</arg_value>\n"
    "<arg_key>max</arg_key>\n<arg_value>%(max)s</arg_value>\n</tool_call>"
)
HARMONY_CALL = " to=functions.%(name)s<|channel|>commentary json<|message|>%(json)s"

COHERE = Family(
    "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>",
    "<PAD> <UNK> <CLS> <SEP> <MASK_TOKEN> <EOS_TOKEN> <EOP_TOKEN>",
    "<|START_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|>",
)  # fmt: skip
DEEPSEEK = Family(
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>",
    "<｜User｜> <｜Assistant｜> <|EOT|> <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> "
    "<｜tool▁call▁begin｜> <｜tool▁call▁end｜> "
    "<｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜> <｜tool▁sep｜>",
    thinks="{}\n</think>\n\n", silent="\n</think>\n\n",
)  # fmt: skip
GEMMA = Family("<bos>", "<eos>", "<pad> <unk> <start_of_turn> <end_of_turn>", stop="<end_of_turn>")
GEMMA4 = Family(
    "<bos>", "<eos>",
    '<pad> <unk> <|turn> <turn|> <|channel> <channel|> <|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> '
    '<tool_response|> <|"|> <|think|> <|image|> <|audio|>',
    stop="<turn|>", call_stop="<|tool_response>", one_call=GEMMA_CALL, between_calls="",
    thinks="<|channel>thought\n{}\n<channel|>",
)  # fmt: skip
GLM = Family(
    "", "<|endoftext|>",
    "[MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|>",
    "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response> <arg_key> </arg_key> <arg_value> "
    "</arg_value> /nothink",
    stop="<|user|>", call_stop="<|observation|>", silent="\n<think></think>\n", thinks="\n<think>{}</think>\n",
    one_call=GLM_CALL,
)  # fmt: skip
GPT_OSS = Family(
    "<|startoftext|>", "<|return|>",
    "<|endoftext|> <|constrain|> <|channel|> <|start|> <|end|> <|message|> <|call|>",
    says="<|channel|>final<|message|>{}", one_call=HARMONY_CALL, call_stop="<|call|>",
    thinks="<|channel|>analysis<|message|>{}<|end|><|start|>assistant",
)  # fmt: skip
LFM2 = Family(
    "<|startoftext|>", "<|im_end|>",
    "<|pad|> <|endoftext|> <|im_start|> <|tool_list_start|> <|tool_list_end|> <|tool_call_start|> <|tool_call_end|> "
    "<|tool_response_start|> <|tool_response_end|> <image>",
    one_call=LFM_CALL, first_call="<|tool_call_start|>[", between_calls=", ", last_call="]<|tool_call_end|>",
)  # fmt: skip
LFM25 = replace(LFM2, plain="<think> </think>", thinks="<think>{}</think>")
LLAMA3 = Family(
    "<|begin_of_text|>", "<|eot_id|>",
    "<|end_of_text|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|python_tag|>", one_call=LLAMA,
)  # fmt: skip
MUSE = Family(
    "<|begin_of_text|>", "<|eot|>", "<|start|> <|message|> <|eom|> <|patch|> <|video|>", says=" to=user<|message|>{}",
    thinks=" to=self<|message|>{}<|eom|><|start|>assistant", one_call=ATEM, between_calls="<|eom|><|start|>assistant",
)  # fmt: skip
NEMOTRON = Family(
    "<s>", "<|im_end|>", "<unk> </s> [INST] [/INST] <|im_start|>",
    "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>",
    one_call=XML, last_call="\n", thinks="{}\n</think>\n", silent="\n</think>\n",
)  # fmt: skip
NEMOTRON_TIGHT = replace(NEMOTRON, thinks="{}</think>", silent="</think>", first_call="\n")
PHI3 = Family(
    "<s>", "<|endoftext|>", "<|assistant|> <|end|> <|user|> <|system|> <|placeholder1|>", stop="<|end|>",
    metaspace=True, rstrip=True,
)  # fmt: skip
QWEN2 = Family("", "<|im_end|>", f"{CHATML} {VISION}", QWEN_TAGS, one_call=HERMES)
QWEN3 = Family(
    "", "<|im_end|>", f"{CHATML} {VISION}", THINKING_TAGS, one_call=HERMES,
    thinks="<think>\n{}\n</think>\n\n", silent="<think>\n\n</think>\n\n",
)  # fmt: skip
QWEN3_PLAIN = Family("", "<|im_end|>", f"{CHATML} {VISION}", THINKING_TAGS, one_call=HERMES)
QWEN35 = Family(
    "", "<|im_end|>", f"{CHATML} {VISION}", THINKING_TAGS, one_call=XML,
    thinks="{}\n</think>\n\n", silent="\n</think>\n\n",
)  # fmt: skip
IDEFICS = Family(
    "<|begin_of_text|>", "<end_of_utterance>", "<|end_of_text|> <image> <fake_token_around_image>", says=" {}"
)
SMOLVLM = Family("<|im_start|>", "<end_of_utterance>", "<|endoftext|> <image> <fake_token_around_image>", says=" {}")
LLAVA = Family("<s>", "</s>", "<unk> <image> <pad>", says=" {}", metaspace=True)

FAMILIES = {
    "cohere": COHERE,
    "cohere2": replace(COHERE, says="{}<|END_RESPONSE|>"),
    "deepseek_r1_distill": replace(DEEPSEEK, plain=f"{DEEPSEEK.plain} <think> </think>"),
    "deepseekv3": DEEPSEEK,  # its tokenizer has no tokens for thoughts: the tags are text
    "diffusion_gemma": GEMMA4,
    "gemma": GEMMA,
    "gemma3": GEMMA,
    "gemma4": GEMMA4,
    "gemma4_v2": replace(GEMMA4, call_stop="<turn|>", thinks=""),
    "gemma4_v3": GEMMA4,
    "gemma4_v4": GEMMA4,
    "gemma4_v5": GEMMA4,
    "glm4moe": GLM,
    "gptoss": GPT_OSS,
    "idefics3": IDEFICS,
    "lfm2": LFM2,
    "lfm2_2_5": LFM25,
    "lfm2_2_5_v2": LFM25,
    "lfm2_2_5_vl": LFM25,
    "lfm2_v2": LFM2,
    "llama3": LLAMA3,
    "llama3_1": LLAMA3,
    "llama3_2": LLAMA3,
    "llava_next": LLAVA,
    "muse_glimmer": MUSE,
    "nemotron_3_5_lightning": NEMOTRON_TIGHT,
    "nemotron_3_nano": NEMOTRON,
    "nemotron_3_super": NEMOTRON,
    "nemotron_3_ultra": NEMOTRON_TIGHT,
    "phi3": PHI3,
    "phi3_5": PHI3,
    "qwen2_5": QWEN2,
    "qwen2_5_vl": QWEN2,
    "qwen3": QWEN3,
    "qwen3_5_nothink": replace(QWEN35, thinks="", silent=""),
    "qwen3_5_think": QWEN35,
    "qwen3_6": QWEN35,
    "qwen3_8": QWEN35,
    "qwen3_instruct_2507": QWEN3_PLAIN,
    "qwen3_vl": QWEN3_PLAIN,
    "smolvlm": SMOLVLM,
}


def family(stem: str) -> Family:
    """The family of one of TRL's templates."""
    return FAMILIES[stem.removesuffix("_training")]


@cache
def _vocabulary(metaspace: bool) -> str:
    return (metaspace_backend() if metaspace else byte_level_backend()).to_str()


@cache
def renderer_for(stem: str, **options) -> ChatRenderer:
    """A renderer of one of TRL's templates with its family's tokenizer."""
    return ChatRenderer(tokenizer_for(stem), **options)


def tokenizer_for(stem: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the family's control tokens and the template."""
    found = family(stem)
    ends = {name: token for name, token in (("bos_token", found.bos), ("eos_token", found.eos)) if token}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_vocabulary(found.metaspace)), **ends)
    for names, special in ((found.special, True), (found.plain, False)):
        added = [AddedToken(name, special=special, normalized=False, rstrip=found.rstrip) for name in names.split()]
        tokenizer.add_tokens(added, special_tokens=special)
    tokenizer.chat_template = (FOLDER / f"{stem}.jinja").read_text()
    return tokenizer
