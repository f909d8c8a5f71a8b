"""The official clients against a running server: openai, and tritonclient in both encodings."""

import sys

import numpy as np
import tritonclient.http as triton
from openai import BadRequestError, NotFoundError, OpenAI
from tritonclient.utils import InferenceServerException

host = sys.argv[1]


def openai() -> None:
    client = OpenAI(base_url=f"http://{host}/v1", api_key="unused")
    model = client.models.list().data[0].id
    steps = {"num_inference_steps": 6, "seed": 1}
    reply = client.images.generate(prompt="0", model=model, n=2, extra_body=steps)
    assert len(reply.data) == 2 and reply.data[0].b64_json
    stream = client.images.generate(
        prompt="0", model=model, stream=True, partial_images=2, extra_body=steps
    )
    events = list(stream)
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"], kinds
    assert events[-1].b64_json == reply.data[0].b64_json
    for wrong, error in [({"prompt": "no such class"}, BadRequestError), ({"model": "nope"}, NotFoundError)]:
        try:
            client.images.generate(**{"prompt": "0", "model": model, **wrong})
        except error:
            continue
        raise AssertionError(f"{wrong} was accepted")


def tritonclient() -> None:
    client = triton.InferenceServerClient(host)
    assert client.is_server_live() and client.is_server_ready()
    model = client.get_model_repository_index()[0]["name"]
    assert client.is_model_ready(model)
    answers = []
    for binary in (True, False):
        inputs = []
        for wanted in client.get_model_metadata(model)["inputs"]:
            shape = [2] + wanted["shape"][1:]
            kind = {"FP32": np.float32, "INT64": np.int64}[wanted["datatype"]]
            values = np.linspace(0, 1, num=int(np.prod(shape))).reshape(shape).astype(kind)
            tensor = triton.InferInput(wanted["name"], shape, wanted["datatype"])
            inputs.append(tensor)
            tensor.set_data_from_numpy(values, binary_data=binary)
        output = triton.InferRequestedOutput("noise_pred", binary_data=binary)
        answers.append(client.infer(model, inputs, outputs=[output]).as_numpy("noise_pred"))
    assert answers[0].shape[0] == 2 and np.array_equal(*answers)
    client.unload_model(model)
    assert not client.is_model_ready(model)
    client.load_model(model)
    assert client.is_model_ready(model)
    try:
        client.infer("nope", inputs)
    except InferenceServerException:
        return
    raise AssertionError("an unknown model was accepted")


openai()
tritonclient()
print("openai and tritonclient: fine")
