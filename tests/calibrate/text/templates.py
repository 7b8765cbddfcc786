"""What published chat templates do with tools, calls and thoughts, each in a few lines: their logic, not their wording.

After the templates of Qwen3-30B-A3B, DeepSeek-R1 (January 2025), DeepSeek-V3.1, gpt-oss-120b, GLM-4.5, Llama-4-Scout
and Mixtral-8x7B-Instruct.
"""

# Arguments may be an object or text; a thought is a field or stands in the content, and only the last one is kept.
QWEN3 = """\
{%- if tools %}<|im_start|>system
{% for t in tools %}{{ t | tojson }}
{% endfor %}<|im_end|>
{% endif %}{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{%- if m.role == 'assistant' %}
{%- set thought = '' %}
{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and thought %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
{{- content }}
{%- for c in m.tool_calls or [] %}{% set c = c.function or c %}
{{- '\\n<tool_call>\\n{"name": "' + c.name + '", "arguments": ' }}
{{- c.arguments if c.arguments is string else c.arguments | tojson }}{{ '}\\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

# Calls only where there is no content, their arguments as text; every thought is cut off; tools are not written at all.
DEEPSEEK_R1 = """\
{{ bos_token }}
{%- for m in messages %}
{%- if m['role'] == 'system' %}{{ m['content'] }}{% endif %}
{%- if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% endif %}
{%- if m['role'] == 'assistant' and m['content'] is none %}{% for t in m['tool_calls'] %}
{{- '<|Assistant|><|call|>' + t['type'] + '<|sep|>' + t['function']['name'] + '\\n' }}
{{- t['function']['arguments'] + '<|end|>' }}
{%- endfor %}{% endif %}
{%- if m['role'] == 'assistant' and m['content'] is not none %}
{%- set content = m['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<|Assistant|>' + content + eos_token }}{% endif %}
{%- if m['role'] == 'tool' %}{{ '<|output|>' + m['content'] }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"""

# Calls have their arguments as text; every thought is cut off; a generation prompt says whether the model is to think.
DEEPSEEK_V31 = """\
{%- if thinking is not defined %}{% set thinking = false %}{% endif %}{{ bos_token }}
{%- set ns = namespace(asked=false) %}
{%- for m in messages %}
{%- if m['role'] == 'system' %}{{ m['content'] }}{% endif %}
{%- if m['role'] == 'user' %}{% set ns.asked = true %}{{ '<|User|>' + m['content'] }}{% endif %}
{%- if m['role'] == 'assistant' and m['tool_calls'] is defined %}
{%- if ns.asked %}{{ '<|Assistant|></think>' }}{% endif %}{% set ns.asked = false %}
{%- for t in m['tool_calls'] %}
{{- '<|call|>' + t['function']['name'] + '<|sep|>' + t['function']['arguments'] + '<|end|>' }}
{%- endfor %}{{ eos_token }}{% endif %}
{%- if m['role'] == 'assistant' and m['tool_calls'] is not defined %}
{%- if ns.asked %}{{ '<|Assistant|></think>' }}{% endif %}{% set ns.asked = false %}
{%- set content = m['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>', 1)[1] %}{% endif %}
{{- content + eos_token }}{% endif %}
{%- if m['role'] == 'tool' %}{{ '<|output|>' + m['content'] }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' + ('<think>' if thinking else '</think>') }}{% endif %}"""

# `reasoning_effort` is a setting; a thought is read from `thinking`, of the last answer or beside a call.
GPT_OSS = """\
{%- if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}
{{- '<|start|>system<|message|>Reasoning: ' + reasoning_effort + '<|end|>' }}
{%- if tools %}{{ '<|start|>developer<|message|>' }}
{%- for t in tools %}{{ 'type ' + t.function.name }}{% endfor %}<|end|>{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' and 'tool_calls' in m %}
{%- if m.content and m.thinking %}{{ raise_exception('Cannot pass both content and thinking') }}{% endif %}
{%- if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant to=functions.' + m.tool_calls[0].function.name + '<|message|>' }}
{{- m.tool_calls[0].function.arguments | tojson }}{{ '<|call|>' }}
{%- elif m.role == 'assistant' %}
{%- if loop.last and not add_generation_prompt and 'thinking' in m %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""

# The thought of an earlier turn becomes an empty one.
GLM4_MOE = """\
[gMASK]<sop>
{%- if tools %}{{ '<|system|>\\n' }}{% for t in tools %}{{ t | tojson(ensure_ascii=False) }}{% endfor %}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|assistant|>' }}
{%- set thought = '' %}{% set content = m.content or '' %}
{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1] %}{% set content = content.split('</think>')[-1] %}
{%- endif %}
{{- '\\n<think>' + (thought.strip() if loop.index0 > ns.last else '') + '</think>' }}
{%- if content.strip() %}{{ '\\n' + content.strip() }}{% endif %}
{%- for c in m.tool_calls or [] %}{% set c = c.function or c %}{{ '\\n<tool_call>' + c.name }}
{%- for k, v in c.arguments.items() %}{{ '\\n<arg_key>' + k + '</arg_key>\\n<arg_value>' }}
{{- v if v is string else v | tojson(ensure_ascii=False) }}</arg_value>{% endfor %}</tool_call>{% endfor %}
{%- else %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

# Calls go before the content, which is not read then; it is not asked whether there is one.
LLAMA = """\
{{- bos_token }}
{%- if tools %}{{ '<|header|>system<|/header|>' }}
{%- for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}<|eot|>{% endif %}
{%- for m in messages %}
{%- if 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('single tool-calls only') }}{% endif %}
{%- set c = m.tool_calls[0].function %}
{{- '<|header|>assistant<|/header|>{"name": "' + c.name + '", "parameters": ' }}{{ c.arguments | tojson }}}<|eot|>
{%- else %}{{ '<|header|>' + m.role + '<|/header|>' + m.content | trim + '<|eot|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|header|>assistant<|/header|>{% endif %}"""

# Users and assistants take turns, and nobody else speaks.
MIXTRAL = """\
{{ bos_token }}{% for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- if m['role'] == 'user' %}{{ ' [INST] ' + m['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"""

ALL = {
    "qwen3": QWEN3, "deepseek-r1": DEEPSEEK_R1, "deepseek-v3.1": DEEPSEEK_V31, "gpt-oss": GPT_OSS,
    "glm-4.5": GLM4_MOE, "llama": LLAMA, "mixtral": MIXTRAL,
}  # fmt: skip
