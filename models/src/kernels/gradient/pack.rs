//! Weights as products read them, made anew from the parameters for each run.

use super::filter::{Filter, Row};
use crate::kernels::arena::Buffer;
use crate::kernels::direct::panel_of;
use crate::kernels::isa::{Isa, Kernel, dispatch};
use crate::kernels::program::{Memory, Operation, Split};
use crate::kernels::scheme::{self, F2, F4, Scheme};
use crate::kernels::simd::Simd;
use crate::kernels::winograd::{Variant, group_size, panel_place};

/// Which operation reads them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// [`crate::kernels::Direct`].
    Direct,
    /// [`crate::kernels::Winograd`].
    Winograd(Variant),
}

/// Packs a layer's weights.
pub(crate) struct Pack {
    pub(crate) filter: Filter,
    pub(crate) form: Form,
    /// Whether for the gradient of the layer's input, which is made from that of its output.
    pub(crate) turned: bool,
    /// The channel at each place of a pixel that the operation reads: an output channel of the layer
    /// where `turned`, an input channel otherwise.
    pub(crate) inputs: Vec<Option<usize>>,
    /// The same for what the operation writes.
    pub(crate) outputs: Vec<Option<usize>>,
    pub(crate) output: Buffer,
}

/// Places that one item packs.
const PIECE: usize = 32;

impl Pack {
    /// Floats of the result.
    pub(crate) fn len(form: Form, isa: Isa, inputs: usize, outputs: usize, taps: usize) -> usize {
        let (panel, positions) = match form {
            Form::Direct => (panel_of(isa, outputs), taps),
            Form::Winograd(variant) => (isa.panel(), variant.positions()),
        };
        outputs.div_ceil(panel) * positions * inputs * panel
    }

    fn panel(&self, isa: Isa) -> usize {
        match self.form {
            Form::Direct => panel_of(isa, self.outputs.len()),
            Form::Winograd(_) => isa.panel(),
        }
    }

    fn pieces(&self) -> usize {
        self.inputs.len().div_ceil(PIECE)
    }
}

impl Operation for Pack {
    fn split(&self, _: usize, _: usize) -> Split {
        // The instruction set is not known here; a panel has at least eight columns.
        Split::one(self.outputs.len().div_ceil(8) * self.pieces())
    }
    fn reads(&self) -> Vec<Buffer> {
        Vec::new()
    }
    fn writes(&self) -> Vec<Buffer> {
        Vec::new()
    }
    fn placed(&self) -> Vec<Buffer> {
        vec![self.output]
    }
    fn name(&self) -> String {
        let form = match self.form {
            Form::Direct => "direct",
            Form::Winograd(_) => "winograd",
        };
        format!("pack {form} {}→{}", self.inputs.len(), self.outputs.len())
    }
    unsafe fn run(&self, memory: &Memory, _: usize, item: usize, _: usize) {
        let panel = self.panel(memory.isa);
        let (number, piece) = (item / self.pieces(), item % self.pieces());
        if number < self.outputs.len().div_ceil(panel) {
            dispatch(memory.isa, Run { pack: self, memory, panel, number, piece });
        }
    }
}

/// Taps of the largest kernel, of four pixels a side.
const MOST_TAPS: usize = 16;

struct Run<'a> {
    pack: &'a Pack,
    memory: &'a Memory<'a>,
    /// Columns of a panel.
    panel: usize,
    /// The panel's number.
    number: usize,
    piece: usize,
}

impl Kernel for Run<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { pack, panel, number, piece, .. } = self;
        let places = piece * PIECE..pack.inputs.len().min((piece + 1) * PIECE);
        let taps = pack.filter.taps;
        let depth = pack.inputs.len();
        let to = self.memory.placed(pack.output);
        // The taps of one input place for all columns.
        let mut columns = [[0f32; 32]; MOST_TAPS];
        for place in places {
            for (j, o) in (number * panel..(number + 1) * panel).enumerate() {
                self.column(place, o, j, &mut columns);
            }
            for lane in (0..panel).step_by(S::LANES) {
                // SAFETY: a panel has at most 32 columns, whole vectors; the result has a place for
                // this panel and input place at each position, and only this item writes it.
                unsafe {
                    let mut vectors = [s.splat(0.0); MOST_TAPS];
                    for (vector, column) in vectors.iter_mut().zip(&columns).take(taps) {
                        *vector = s.load(column.as_ptr().add(lane));
                    }
                    match pack.form {
                        Form::Direct => {
                            for (tap, vector) in vectors.iter().enumerate().take(taps) {
                                let row = (number * taps + tap) * depth + place;
                                s.store(to.add(row * panel + lane), *vector);
                            }
                        }
                        Form::Winograd(Variant::F2) => {
                            self.positions::<S, F2>(s, &vectors, place, to.add(lane));
                        }
                        Form::Winograd(Variant::F4) => {
                            self.positions::<S, F4>(s, &vectors, place, to.add(lane));
                        }
                    }
                }
            }
        }
    }
}

impl Run<'_> {
    /// Takes the taps from input place `place` to output place `o` as column `j`.
    #[inline(always)]
    fn column(&self, place: usize, o: usize, j: usize, columns: &mut [[f32; 32]; MOST_TAPS]) {
        let pack = self.pack;
        let taps = pack.filter.taps;
        let (input, output) = (pack.inputs[place], pack.outputs.get(o).copied().flatten());
        let (Some(input), Some(output)) = (input, output) else {
            columns.iter_mut().for_each(|column| column[j] = 0.0);
            return;
        };
        let (o, c) = if pack.turned { (input, output) } else { (output, input) };
        let (values, factor) = pack.filter.taps(self.memory, o, c);
        // A convolution by transforms sees the taps the other way round; one by pointers looks for its
        // pixels the other way round.
        let rotated = pack.turned && pack.form != Form::Direct;
        for (tap, value) in values.iter().enumerate() {
            columns[if rotated { taps - 1 - tap } else { tap }][j] = factor * value;
        }
    }

    /// # Safety
    /// `to` is good for writing a vector at each position's place for the panel.
    #[inline(always)]
    unsafe fn positions<S: Simd, F: Scheme>(
        &self,
        s: S,
        taps: &[S::V; MOST_TAPS],
        place: usize,
        to: *mut f32,
    ) {
        let (depth, positions) = (self.pack.inputs.len(), F::IN * F::IN);
        let panels = self.pack.outputs.len().div_ceil(self.panel);
        let group = group_size(panels);
        // Transforms are of kernels of three pixels a side.
        let taps = &std::array::from_fn(|tap| taps[tap]);
        let all = scheme::weights::<S, F>(s, taps);
        for (position, vector) in all.iter().enumerate().take(positions) {
            let start = panel_place(panels, group, positions, self.number, position);
            // SAFETY: the caller's promise.
            unsafe { s.store(to.add((start * depth + place) * self.panel), *vector) };
        }
    }
}

/// Copies a layer's biases to whole panels.
pub(crate) struct PackBias {
    /// One for each output channel.
    pub(crate) rows: Vec<Row>,
    pub(crate) output: Buffer,
}

impl Operation for PackBias {
    fn split(&self, _: usize, _: usize) -> Split {
        Split::one(1)
    }
    fn reads(&self) -> Vec<Buffer> {
        Vec::new()
    }
    fn writes(&self) -> Vec<Buffer> {
        Vec::new()
    }
    fn placed(&self) -> Vec<Buffer> {
        vec![self.output]
    }
    fn name(&self) -> String {
        "pack bias".to_string()
    }
    unsafe fn run(&self, memory: &Memory, _: usize, _: usize, _: usize) {
        let to = memory.placed(self.output);
        for i in 0..self.output.len {
            let value = self
                .rows
                .get(i)
                .map_or(0.0, |row| row.factor * memory.parameters[row.parameter][row.start]);
            // SAFETY: the place is in the buffer, which this item alone writes.
            unsafe { *to.add(i) = value };
        }
    }
}
