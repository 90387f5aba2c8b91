"""Built TensorRT engines: found, loaded, run, refitted. TensorRT is imported when it is used."""
