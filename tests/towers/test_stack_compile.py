# SPDX-License-Identifier: Apache-2.0
"""A patched tower under torch.compile and torch.export."""

from __future__ import annotations

import io

import pytest
import torch
from families import FAMILIES, outputs, randn
from stack import assert_rule, equal, shaken
from test_families import run
from torch._dynamo.backends.debugging import aot_eager

from spatial_pe.towers import patch

WHOLE = pytest.mark.parametrize(
    ("name", "options"), [("dinov3", {}), ("clip", {}), ("siglip", {}), ("clip", {"rope": "mixed"})]
)


def fused_calls(graph: torch.fx.Graph) -> int:
    return sum("spatial_pe.rope_attention" in str(node.target) for node in graph.nodes)


@WHOLE
def test_a_compiled_tower_learns_what_it_would(name, options):
    """The whole tower as one graph, forward and backward."""
    family = FAMILIES[name]
    inputs = family.inputs()
    theirs, exact, model = family.make(), family.make().double(), family.make()
    if options:  # the same model uncompiled is what there is to compare with
        for other in (theirs, exact):
            patch(other, **options)
            shaken(other)
    patch(model, **options)
    shaken(model)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(fused_calls(graph.graph))
        return aot_eager(graph, example_inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    found = run(compiled, family, inputs, torch.float32)
    assert graphs == [family.layers]
    found = found[0], {key.removeprefix("_orig_mod."): g for key, g in found[1].items()}
    assert_rule(found, run(theirs, family, inputs, torch.float32), run(exact, family, inputs, torch.float64))
    torch._dynamo.reset()


# the one with RoPE reads the grid as well
@pytest.mark.parametrize(
    "options", [pytest.param({}, id="plain", marks=pytest.mark.slow), pytest.param({"rope": "mixed"}, id="rope")]
)
def test_a_compiled_tower_is_not_compiled_again(options):
    """The next batch of the same shape finds the graph: what hooks record must not be among its guards."""
    family = FAMILIES["clip"]
    model, inputs = family.make(), family.inputs()
    patch(model, **options)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            assert equal(outputs(compiled, inputs), outputs(model, inputs))
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [{}, {"rope": "mixed"}], ids=["plain", "rope"])
def test_a_compiled_tower_takes_other_resolutions(options):
    """torch.compile makes a size that changed symbolic: the unpatched tower compiles with it in one graph."""
    family = FAMILIES["siglip"]
    model, inputs = family.make(), family.inputs()
    patch(model, **options)
    shaken(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for sides in [(40, 24), (40, 32), (40, 24)]:
            given = {**inputs, "pixel_values": randn(2, 3, *sides)}
            assert equal(outputs(compiled, given), outputs(model, given))
    torch._dynamo.reset()


@WHOLE
def test_an_exported_tower_computes_the_same(name, options):
    """The program, written to a file and read again, has the tower's own outputs, for batches of any size, and the
    fused op in it. (Of Qwen's tower and Pixtral's not even the unpatched can be exported: their grids are data.)"""
    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs()
    patch(model, **options)
    shaken(model)
    other = {**inputs, "pixel_values": randn(5, *inputs["pixel_values"].shape[1:], seed=2)}
    shapes = {**dict.fromkeys(inputs), "pixel_values": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
        assert fused_calls(program.graph) == family.layers
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        again = torch.export.load(file).module()
        for given in (inputs, other):
            assert equal(outputs(again, given), outputs(model, given))
