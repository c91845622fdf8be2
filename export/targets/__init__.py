"""What engines are lowered to: ONNX, AOTInductor. One module a target."""
