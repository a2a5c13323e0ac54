"""Files for other runtimes: ONNX, by torch's own exporter, and OpenVINO's IR, by its own converter."""
