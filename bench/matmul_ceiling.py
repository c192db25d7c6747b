"""Prints the rate of a large bf16 matrix product on the GPU: the ceiling of matrix-bound kernels."""

import torch

from common import device_clock

SIZE, ROUNDS = 8192, 20


def main() -> None:
    a, b = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    now, times = device_clock(), []
    for _ in range(ROUNDS):
        start = now()
        a @ b
        times.append(now() - start)
    print(f"bf16 matrix product of {SIZE}: {2 * SIZE**3 / sorted(times)[ROUNDS // 2] / 1e12:.0f} TFLOP/s")


if __name__ == "__main__":
    main()
