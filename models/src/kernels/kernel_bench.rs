//! One layer by itself, on maps that stay in the arena: for benches.

use std::sync::Arc;

use super::{
    Aligned, Attend, Buffer, Channels, Constants, Direct, ElementType, Finish, Function, Grid,
    GroupNormAffine, GroupNormApply, GroupNormStatistics, Image, Isa, Layout, Operation, PackKeys,
    PackValues, Program, Quantize, Quantized, QuantizedWeights, Taps, Upsample, Values, Variant,
    Winograd, padded,
};

/// What a layer does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// A 3×3 convolution that keeps the size of a map, by all products.
    Direct,
    /// The same by Winograd's algorithm, two by two pixels at a time.
    F2,
    /// The same, of weights that are transformed as they are used.
    F2OfTaps,
    /// The same, four by four pixels at a time.
    F4,
    /// A 3×3 convolution to half the size.
    Strided,
    /// A linear map of each pixel.
    Pointwise,
    /// A 3×3 convolution that keeps the size of a map, of codes of 8 bits, the map being quantised first.
    Int8,
    /// A linear map of each pixel, of codes of 8 bits, the map being quantised first.
    Int8Pointwise,
    /// Group norm and SiLU.
    Norm,
    /// Self-attention with one head over queries, keys and values, a third of the channels each.
    Attention,
    /// Twice the size, by repetition.
    Upsample,
}

/// A layer over maps `[channels, side, side]`, with weights by formula.
pub struct KernelBench {
    program: Program,
    flop: f64,
}

impl KernelBench {
    /// To `outputs` channels; norm, attention and upsampling decide on theirs themselves.
    ///
    /// # Panics
    /// Where `isa` is not this processor's, or does not multiply bf16 that is asked for.
    pub fn new(
        isa: Isa,
        bf16: bool,
        layer: Layer,
        [channels, side]: [usize; 2],
        outputs: usize,
    ) -> Self {
        assert!(!bf16 || isa.multiplies_bf16(), "{isa} does not multiply bf16");
        let numbers = if bf16 { ElementType::Bf16 } else { ElementType::F32 };
        let mut layout = Layout::default();
        let mut image = |numbers: ElementType, channels: usize, side: usize| {
            let buffer = layout.take(side * side * numbers.words(padded(channels)));
            Image { buffer, element: numbers, height: side, width: side, segments: [channels, 0] }
        };
        let source = image(numbers, channels, side);
        let target = match layer {
            Layer::Strided => image(numbers, outputs, side / 2),
            Layer::Upsample => image(numbers, channels, 2 * side),
            Layer::Norm => image(numbers, channels, side),
            Layer::Attention => image(numbers, channels / 3, side),
            _ => image(numbers, outputs, side),
        };
        let finish = || Finish::new(&formula(outputs), isa.panel());
        let direct = |side, stride, padding| -> Vec<Box<dyn Operation>> {
            let taps = Taps { side, stride, padding, doubled: false };
            let weights = formula(outputs * channels * side * side);
            vec![Box::new(Direct::new(isa, &[source], target, taps, &weights, finish()))]
        };
        let winograd = |variant| -> Vec<Box<dyn Operation>> {
            let weights = formula(outputs * channels * 9);
            vec![Box::new(Winograd::new(isa, variant, source, target, false, &weights, finish()))]
        };
        let int8 = |taps: Taps, layout: &mut Layout| -> Vec<Box<dyn Operation>> {
            let codes = layout.take(Quantize::len(&source));
            let buckets = vec![(1.0 / 128.0, 128), (1.0 / 127.0, 127)];
            let grid = Arc::new(Grid { time: 0, starts: [500.0].into(), buckets });
            let code = |x: f32| (127.0 * x) as i8;
            let len = outputs * channels * taps.side * taps.side;
            let weights: Vec<i8> = formula(len).into_iter().map(code).collect();
            let weights = QuantizedWeights { codes: &weights, scales: &vec![1.0 / 127.0; outputs] };
            let packed = Quantized::pack(isa, [&source, &target], taps, &weights, &grid);
            let (packed, from) = (packed.map(Arc::new), (source, codes));
            vec![
                Box::new(Quantize::new(source, codes, grid.clone())),
                Box::new(Quantized::new(isa, from, target, taps, packed, grid, finish())),
            ]
        };
        let operations: Vec<Box<dyn Operation>> = match layer {
            Layer::Int8 => int8(Taps::SAME, &mut layout),
            Layer::Int8Pointwise => int8(Taps::POINT, &mut layout),
            Layer::Direct => direct(3, 1, 1),
            Layer::F2 => winograd(Variant::F2),
            Layer::F2OfTaps => {
                let weights = formula(outputs * channels * 9);
                let packed = Direct::pack(isa, &[source], target, Taps::SAME, &weights);
                let weights = Constants::Own(packed.into());
                vec![Box::new(Winograd::of_taps(isa, source, target, false, weights, finish()))]
            }
            Layer::F4 => winograd(Variant::F4),
            Layer::Strided => direct(3, 2, 0),
            Layer::Pointwise => direct(1, 1, 0),
            Layer::Norm => norm(source, target, &mut layout),
            Layer::Attention => {
                let (heads, panel, rows) = (1, isa.panel(), isa.rows());
                let width = source.channels() / 3;
                let [queries, keys, values] =
                    [0, 1, 2].map(|part| Channels { image: source, start: part * width, width });
                let packed = layout.take(PackKeys::len(&keys, panel));
                let pack = PackKeys { keys, heads, panel, output: packed };
                let mut operations: Vec<Box<dyn Operation>> = vec![Box::new(pack)];
                let pairs = bf16.then(|| layout.take(PackValues::len(&values)));
                if let Some(output) = pairs {
                    operations.push(Box::new(PackValues { values, output }));
                }
                operations.push(Box::new(Attend {
                    queries,
                    keys: packed,
                    values,
                    pairs,
                    heads,
                    panel,
                    rows,
                    causal: false,
                    count: None,
                    output: target,
                }));
                operations
            }
            Layer::Upsample => vec![Box::new(Upsample { input: source, output: target })],
        };
        let flop = operations.iter().map(|operation| operation.flop()).sum();
        Self { program: Program::new(isa, operations, &layout, vec![1], 0), flop }
    }

    /// Runs it for `batch` samples on the threads of the current rayon pool.
    ///
    /// # Panics
    /// Where memory ends.
    pub fn run(&self, batch: usize) {
        let run = self.program.run(batch, &[&vec![0.0; batch]], &mut []);
        run.unwrap_or_else(|error| panic!("no memory for {} bytes", error.bytes));
    }

    /// Floating-point operations for one sample, counted as a direct implementation would need them; 0
    /// where moving data is all there is.
    pub fn flop(&self) -> f64 {
        self.flop
    }
}

fn norm(source: Image, target: Image, layout: &mut Layout) -> Vec<Box<dyn Operation>> {
    let channels = source.channels();
    let statistics: Buffer = layout.take(GroupNormStatistics::len(&source));
    let map = layout.take(2 * target.stride());
    let settle = GroupNormAffine {
        sources: vec![(source, statistics)],
        target,
        groups: 8,
        eps: 1e-6,
        weight: Values::Own(Aligned::of(&formula(channels), 1).into()),
        bias: Values::Own(Aligned::of(&formula(channels), 1).into()),
        modulation: None,
        output: map,
        moments: None,
    };
    vec![
        Box::new(GroupNormStatistics { input: source, output: statistics }),
        Box::new(settle),
        Box::new(GroupNormApply::new(&[source], target, map, Function::Silu)),
    ]
}

/// ElementType from −1 to 1.
fn formula(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919) % 1009) as f32 / 504.5 - 1.0).collect()
}
