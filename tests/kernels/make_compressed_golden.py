"""Writes golden/compressed_tensors.safetensors: matrices that the library packed, and unpacked again.

Run where compressed-tensors is installed (the project never imports it), from the root of the repository:
PYTHONPATH=. python -m tests.kernels.make_compressed_golden
Scales are bfloat16, as checkpoints have them, or float32; the library unpacks to the type of the scales.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

OUTPUT = Path(__file__).parent / "golden" / "compressed_tensors.safetensors"
# Outputs are no multiple of the eight values in a word, as zero points are packed along them.
OUTPUTS, INPUTS = 20, 128


def main() -> None:
    import compressed_tensors
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    random = torch.Generator().manual_seed(0)
    stored = {}
    for kind in ("INT4_G32", "INT4_G64", "INT4_G128", "UINT4_G32", "UINT4_G64", "UINT4_G128", "INT8", "FP8"):
        for dtype in (torch.bfloat16, torch.float32):
            weight = (torch.randn(OUTPUTS, INPUTS, generator=random) * 0.05 + 0.01).to(dtype)
            format = {"INT8": "int-quantized", "FP8": "float-quantized"}.get(kind, "pack-quantized")
            args = (
                QuantizationArgs(num_bits=8, type="float" if kind == "FP8" else "int", strategy="channel")
                if format != "pack-quantized"
                else QuantizationArgs(num_bits=4, symmetric=kind.startswith("INT"), strategy="group",
                                      group_size=int(kind.partition("_G")[2]))
            )
            groups = weight.view(OUTPUTS, -1, args.group_size or INPUTS)
            scale, zeros = calculate_qparams(groups.amin(2), groups.amax(2), args)
            scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format)
            compressor = BaseCompressor.get_value_from_registry(format)
            parts = {"weight": weight, "weight_scale": scale.to(dtype)}
            if not args.symmetric:
                parts["weight_zero_point"] = zeros.to(torch.int8)
            packed = compressor.compress(parts, scheme)
            name = f"{kind}.{str(dtype).removeprefix('torch.')}"
            stored |= {f"{name}.{part}": tensor.contiguous() for part, tensor in packed.items()}
            stored[f"{name}.unpacked"] = compressor.decompress(packed, scheme)["weight"].contiguous()
    save_file(stored, OUTPUT, {"made_with": f"compressed-tensors {compressed_tensors.__version__}"})


if __name__ == "__main__":
    main()
