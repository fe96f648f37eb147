# For machines with NVIDIA GPUs and the NVIDIA Container Toolkit. PyTorch's wheel brings CUDA, the host the driver.
#
#     docker build -t aymen-gpt .
#     docker run --rm -it --gpus all --ipc host -v "$PWD/work:/work" aymen-gpt \
#         torchrun --standalone --nproc_per_node=8 pretrain.py --data /work/data --run-dir /work/runs/gpt2
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /aymen-gpt
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e .
CMD ["bash"]
