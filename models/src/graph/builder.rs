//! Recording a graph, operation by operation.

use std::collections::HashMap;
use std::fmt::Display;

use super::{
    Epilogue, Graph, Grid, Kind, Map, MapInfo, Op, Product, Scalar, Sees, Size, Slice, Wave,
    WeightId, WeightSpec,
};
use crate::kernels::{Function, Taps};

/// The products that an attention begins with, as diffusers names them.
const Q: &str = "to_q";
const K: &str = "to_k";
const V: &str = "to_v";

/// A place in the tree of weights, named as in diffusers: `down_blocks.0.resnets.1`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Name(String);

impl Name {
    /// The place `name` below this one.
    pub(crate) fn at(&self, name: impl Display) -> Self {
        if self.0.is_empty() { Self(name.to_string()) } else { Self(format!("{}.{name}", self.0)) }
    }
}

/// A graph in the making. Each method adds an operation and gives the map that it writes.
///
/// The sizes are those that a checked configuration gives; what does not fit together is a fault of the description, and
/// panics.
#[derive(Debug, Default)]
pub(crate) struct GraphBuilder {
    ops: Vec<Op>,
    maps: Vec<MapInfo>,
    weights: Vec<WeightSpec>,
    names: HashMap<String, WeightId>,
    patch: usize,
}

impl GraphBuilder {
    /// Of a network that cuts its images into squares of `patch` pixels a side; 1 if it does not.
    pub(crate) fn new(patch: usize) -> Self {
        Self { patch, ..Self::default() }
    }

    /// The graph, whose answer is `source`, divided by the time where `divided` says so.
    pub(crate) fn finish(self, source: Map, divided: bool) -> Graph {
        self.answered(Op::Answer { source, divided, factor: 1.0, shift: 0.0 })
    }

    /// The graph, whose answer is `factor·source + shift`.
    pub(crate) fn finish_with(self, source: Map, factor: f32, shift: f32) -> Graph {
        self.answered(Op::Answer { source, divided: false, factor, shift })
    }

    /// An answer beside the last.
    pub(crate) fn answer(&mut self, source: Map) {
        self.maps[source.0].kind = Kind::Answer;
        self.ops.push(Op::Answer { source, divided: false, factor: 1.0, shift: 0.0 });
    }

    fn answered(mut self, answer: Op) -> Graph {
        for map in answer.reads() {
            self.maps[map.0].kind = Kind::Answer;
        }
        self.ops.push(answer);
        let Self { ops, maps, weights, patch, .. } = self;
        Graph { ops, maps, weights, patch }
    }

    /// How large a map is.
    pub(crate) fn size(&self, map: Map) -> Size {
        self.maps[map.0].size
    }

    fn map(&mut self, size: Size, kind: Kind) -> Map {
        self.maps.push(MapInfo { size, kind });
        Map(self.maps.len() - 1)
    }

    fn vector(&mut self, channels: usize) -> Map {
        self.map(Size { height: 1, width: 1, channels }, Kind::Vector)
    }

    /// A map of the pixels of `like`, and of its kind.
    fn like(&mut self, like: Map, channels: usize) -> Map {
        let MapInfo { size, kind } = self.maps[like.0];
        self.map(Size { channels, ..size }, kind)
    }

    /// The weight `name`; one that is read twice is one weight.
    pub(crate) fn weight(&mut self, name: &Name, shape: &[usize]) -> WeightId {
        if let Some(&id) = self.names.get(&name.0) {
            let known = &mut self.weights[id.0];
            assert_eq!(known.shape, shape, "a weight has one shape");
            known.readers += 1;
            return id;
        }
        let id = WeightId(self.weights.len());
        self.weights.push(WeightSpec { name: name.0.clone(), shape: shape.to_vec(), readers: 1 });
        self.names.insert(name.0.clone(), id);
        id
    }

    /// Weight and bias of a layer, whose first dimension is its outputs.
    fn product(&mut self, name: &Name, shape: &[usize]) -> Product {
        let weight = self.weight(&name.at("weight"), shape);
        let bias = Some(self.weight(&name.at("bias"), &shape[..1]));
        Product { weight, bias, factor: 1.0 }
    }

    /// `factor·x + shift` of the noisy sample.
    pub(crate) fn sample(&mut self, size: Size, factor: f32, shift: f32) -> Map {
        let to = self.map(size, Kind::Features);
        self.ops.push(Op::Sample { factor, shift, to });
        to
    }

    /// Sines and cosines, a vector of `width` numbers.
    pub(crate) fn sinusoid(&mut self, of: Scalar, wave: Wave, width: usize) -> Map {
        let to = self.vector(width);
        self.ops.push(Op::Sinusoid { of, wave, to });
        to
    }

    /// Each sample's row of the table `name`, of `rows` rows of `width` numbers.
    pub(crate) fn row(&mut self, name: &Name, of: Scalar, rows: usize, width: usize) -> Map {
        let table = self.weight(name, &[rows, width]);
        let to = self.vector(width);
        self.ops.push(Op::Row { of, table, to });
        to
    }

    /// The condition, a vector of `width` numbers.
    pub(crate) fn condition(&mut self, width: usize) -> Map {
        let to = self.vector(width);
        self.ops.push(Op::Condition { to });
        to
    }

    /// The condition's first `text` numbers, and `width` sines and cosines of each of the `numbers` others.
    pub(crate) fn text_time(
        &mut self,
        [text, numbers]: [usize; 2],
        (shift, cosines_first): (f64, bool),
        width: usize,
    ) -> Map {
        let to = self.vector(text + numbers * width);
        self.ops.push(Op::TextTime { text, numbers, shift, cosines_first, to });
        to
    }

    /// Of each of `tokens` tokens its row of the table `name`, of `rows` rows, plus its place's row of the table `places`.
    pub(crate) fn embed(
        &mut self,
        name: &Name,
        places: &Name,
        [rows, tokens]: [usize; 2],
        width: usize,
    ) -> Map {
        let table = self.weight(name, &[rows, width]);
        let places = self.weight(places, &[tokens, width]);
        let to = self.map(Size { height: 1, width: tokens, channels: width }, Kind::Features);
        self.ops.push(Op::Embed { table, places, to });
        to
    }

    /// The hidden states of a prompt of so many tokens, `width` numbers each.
    pub(crate) fn prompt(&mut self, tokens: usize, width: usize) -> Map {
        let to = self.map(Size { height: 1, width: tokens, channels: width }, Kind::Features);
        self.ops.push(Op::Prompt { to });
        to
    }

    /// Of each pixel the nearest of the `rows` rows of the table `name`.
    pub(crate) fn nearest(&mut self, name: &Name, source: Map, rows: usize) -> Map {
        let channels = self.size(source).channels;
        let table = self.weight(name, &[rows, channels]);
        let to = self.like(source, channels);
        self.ops.push(Op::Nearest { source, table, to });
        to
    }

    /// Sines and cosines of each pixel's column and row.
    pub(crate) fn positions(&mut self, size: Size, grid: Grid) -> Map {
        let to = self.map(size, Kind::Features);
        self.ops.push(Op::Positions { grid, to });
        to
    }

    /// The middle of the square table `name` of `side·side` places.
    pub(crate) fn crop(&mut self, name: &Name, side: usize, size: Size) -> Map {
        let table = self.weight(name, &[1, side * side, size.channels]);
        let to = self.map(size, Kind::Features);
        self.ops.push(Op::Crop { table, side, to });
        to
    }

    /// A product with a vector, for the offset or modulation of other operations.
    pub(crate) fn project(&mut self, name: &Name, source: Map, width: usize) -> Map {
        let input = self.size(source).channels;
        let product = self.product(name, &[width, input]);
        let to = self.vector(width);
        self.ops.push(Op::Project { source, product, to });
        to
    }

    /// A linear map of each pixel to `width` channels.
    pub(crate) fn linear(&mut self, name: &Name, source: Map, width: usize) -> Map {
        self.linear_with(name, source, width, Epilogue::default())
    }

    /// The same, with what else goes into the sums.
    pub(crate) fn linear_with(
        &mut self,
        name: &Name,
        source: Map,
        width: usize,
        epilogue: Epilogue,
    ) -> Map {
        let input = self.size(source).channels;
        let product = self.product(name, &[width, input]);
        self.products(&[source], vec![product], width, epilogue)
    }

    /// A linear map of each pixel without a bias.
    pub(crate) fn linear_unbiased(
        &mut self,
        name: &Name,
        source: Map,
        width: usize,
        epilogue: Epilogue,
    ) -> Map {
        let weight = self.weight(&name.at("weight"), &[width, self.size(source).channels]);
        let product = Product { weight, bias: None, factor: 1.0 };
        self.products(&[source], vec![product], width, epilogue)
    }

    /// A linear map of each pixel whose weight is kept as a convolution's kernel, of one pixel or of a patch's: its
    /// numbers are `kernel`, the output channels first.
    pub(crate) fn kernel(
        &mut self,
        name: &Name,
        sources: &[Map],
        kernel: &[usize],
        epilogue: Epilogue,
    ) -> Map {
        let product = self.product(name, kernel);
        self.products(sources, vec![product], kernel[0], epilogue)
    }

    fn products(
        &mut self,
        sources: &[Map],
        products: Vec<Product>,
        width: usize,
        epilogue: Epilogue,
    ) -> Map {
        let to = self.like(sources[0], width);
        let sources = sources.to_vec();
        self.ops.push(Op::Linear { sources, products, epilogue, to });
        to
    }

    /// A convolution to `channels` channels, with a square kernel.
    pub(crate) fn convolve(
        &mut self,
        name: &Name,
        source: Map,
        channels: usize,
        taps: Taps,
        epilogue: Epilogue,
    ) -> Map {
        let input = self.size(source).channels;
        let product = self.product(name, &[channels, input, taps.side, taps.side]);
        self.convolution(source, product, taps, epilogue)
    }

    /// A convolution without a bias.
    pub(crate) fn convolve_unbiased(
        &mut self,
        name: &Name,
        source: Map,
        channels: usize,
        taps: Taps,
    ) -> Map {
        let shape = [channels, self.size(source).channels, taps.side, taps.side];
        let weight = self.weight(&name.at("weight"), &shape);
        let product = Product { weight, bias: None, factor: 1.0 };
        self.convolution(source, product, taps, Epilogue::default())
    }

    fn convolution(
        &mut self,
        source: Map,
        product: Product,
        taps: Taps,
        epilogue: Epilogue,
    ) -> Map {
        let Size { height, width, .. } = self.size(source);
        let channels = self.weights[product.weight.0].shape[0];
        let [height, width] = [height, width].map(|side| taps.output(side));
        let to = self.map(Size { height, width, channels }, Kind::Features);
        self.ops.push(Op::Convolve { source, product, taps, epilogue, to });
        to
    }

    /// Group norm over the channels of one or two sources.
    pub(crate) fn group_norm(
        &mut self,
        name: &Name,
        sources: &[Map],
        (groups, eps): (usize, f64),
        modulation: Option<Map>,
        function: Function,
    ) -> Map {
        let channels = sources.iter().map(|&source| self.size(source).channels).sum();
        let [weight, bias] =
            ["weight", "bias"].map(|part| self.weight(&name.at(part), &[channels]));
        let to = self.like(sources[0], channels);
        let sources = sources.to_vec();
        self.ops.push(Op::GroupNorm {
            sources,
            weight,
            bias,
            groups,
            eps,
            modulation,
            function,
            to,
        });
        to
    }

    /// Multi-head self-attention between `to_q`, `to_k` and `to_v` of `name`, without the last product.
    pub(crate) fn self_attention(
        &mut self,
        name: &Name,
        source: Map,
        heads: usize,
        bias: bool,
    ) -> Map {
        self.attention_within(name, [Q, K, V], source, heads, (bias, Sees::All))
    }

    /// The same between three products of other names, which have biases; no token sees one after it.
    pub(crate) fn causal_attention(
        &mut self,
        name: &Name,
        parts: [&str; 3],
        source: Map,
        heads: usize,
    ) -> Map {
        self.attention_within(name, parts, source, heads, (true, Sees::Earlier))
    }

    fn attention_within(
        &mut self,
        name: &Name,
        parts: [&str; 3],
        source: Map,
        heads: usize,
        (bias, sees): (bool, Sees),
    ) -> Map {
        let width = self.size(source).channels;
        let scale = query_scale(width, heads);
        let products = [(parts[0], scale), (parts[1], 1.0), (parts[2], 1.0)]
            .map(|(part, factor)| self.part(&name.at(part), factor, [width, width], bias));
        let map = self.products(&[source], products.to_vec(), 3 * width, Epilogue::default());
        let slices = [0, 1, 2].map(|part| Slice { map, start: part * width, width });
        self.attend(slices, heads, sees)
    }

    /// Multi-head attention of `source` over `context`, between `to_q`, `to_k` and `to_v` of `name`, without the last
    /// product.
    pub(crate) fn cross_attention(
        &mut self,
        name: &Name,
        source: Map,
        context: Map,
        heads: usize,
        (bias, sees): (bool, Sees),
    ) -> Map {
        let (width, wide) = (self.size(source).channels, self.size(context).channels);
        let query = self.part(&name.at(Q), query_scale(width, heads), [width, width], bias);
        let map = self.products(&[source], vec![query], width, Epilogue::default());
        let queries = Slice { map, start: 0, width };
        let parts = [K, V].map(|part| self.part(&name.at(part), 1.0, [width, wide], bias));
        let map = self.products(&[context], parts.to_vec(), 2 * width, Epilogue::default());
        let [keys, values] = [0, 1].map(|part| Slice { map, start: part * width, width });
        self.attend([queries, keys, values], heads, sees)
    }

    /// A linear map of each pixel as wide as it is, times `factor`: queries, keys or values.
    pub(crate) fn scaled(&mut self, name: &Name, source: Map, factor: f64) -> Map {
        let width = self.size(source).channels;
        let product = self.part(name, factor, [width, width], true);
        self.products(&[source], vec![product], width, Epilogue::default())
    }

    /// The product that makes queries, keys or values.
    fn part(&mut self, name: &Name, factor: f64, shape: [usize; 2], bias: bool) -> Product {
        let weight = self.weight(&name.at("weight"), &shape);
        let bias = bias.then(|| self.weight(&name.at("bias"), &shape[..1]));
        Product { weight, bias, factor }
    }

    /// Attention of queries over keys and values.
    pub(crate) fn attend(
        &mut self,
        [queries, keys, values]: [Slice; 3],
        heads: usize,
        sees: Sees,
    ) -> Map {
        let to = self.like(queries.map, queries.width);
        self.ops.push(Op::Attend { queries, keys, values, heads, sees, to });
        to
    }

    /// The pixels of several maps of as many channels, as one row.
    pub(crate) fn join(&mut self, sources: &[Map]) -> Map {
        let channels = self.size(sources[0]).channels;
        assert!(sources.iter().all(|&source| self.size(source).channels == channels));
        let pixels = |&source: &Map| self.size(source).height * self.size(source).width;
        let size = Size { height: 1, width: sources.iter().map(pixels).sum(), channels };
        let to = self.map(size, Kind::Features);
        self.ops.push(Op::Join { sources: sources.to_vec(), to });
        to
    }

    /// The pixels of a map from `first` on, as a map of the pixels of `like`.
    pub(crate) fn take(&mut self, source: Map, first: usize, like: Map) -> Map {
        let to = self.like(like, self.size(source).channels);
        self.ops.push(Op::Take { source, first, to });
        to
    }

    /// Each head of `width` channels by its root mean square, times the weight `name` and `factor`.
    pub(crate) fn rms_norm(
        &mut self,
        name: &Name,
        source: Map,
        width: usize,
        (eps, factor): (f64, f32),
    ) -> Map {
        let weight = self.weight(&name.at("weight"), &[width]);
        let to = self.like(source, self.size(source).channels);
        self.ops.push(Op::RmsNorm { source, weight, eps, factor, to });
        to
    }

    /// Half the size, by the mean of each four pixels.
    pub(crate) fn downsample(&mut self, source: Map) -> Map {
        let Size { height, width, channels } = self.size(source);
        let to = self.map(Size { height: height / 2, width: width / 2, channels }, Kind::Features);
        self.ops.push(Op::Downsample { source, to });
        to
    }

    /// Twice the size, each pixel becoming four.
    pub(crate) fn upsample(&mut self, source: Map) -> Map {
        let Size { height, width, channels } = self.size(source);
        let to = self.map(Size { height: 2 * height, width: 2 * width, channels }, Kind::Features);
        self.ops.push(Op::Upsample { source, to });
        to
    }

    /// Layer norm, scaled by part `scale` of a vector and shifted by part `shift`.
    pub(crate) fn modulate(
        &mut self,
        source: Map,
        eps: f64,
        vector: Map,
        [scale, shift]: [usize; 2],
    ) -> Map {
        let to = self.like(source, self.size(source).channels);
        let plus_one = true;
        self.ops.push(Op::Modulate { source, eps, vector, scale, shift, plus_one, to });
        to
    }

    /// Layer norm with a weight and a bias.
    pub(crate) fn layer_norm(&mut self, name: &Name, source: Map, eps: f64) -> Map {
        let channels = self.size(source).channels;
        let weights =
            ["weight", "bias"].map(|part| self.weight(&name.at(part), &[channels])).to_vec();
        let vector = self.vector(2 * channels);
        self.ops.push(Op::Learned { weights, to: vector });
        let to = self.like(source, channels);
        let (scale, shift, plus_one) = (0, 1, false);
        self.ops.push(Op::Modulate { source, eps, vector, scale, shift, plus_one, to });
        to
    }

    /// A weight `[parts, channels]` as a vector that is the same for every sample.
    pub(crate) fn table(&mut self, name: &Name, shape: [usize; 2]) -> Map {
        let weights = vec![self.weight(name, &shape)];
        let to = self.vector(shape[0] * shape[1]);
        self.ops.push(Op::Learned { weights, to });
        to
    }

    /// A vector plus others, one after another, as long as it together.
    pub(crate) fn sum(&mut self, source: Map, parts: &[Map]) -> Map {
        let width = self.size(source).channels;
        assert_eq!(parts.iter().map(|&part| self.size(part).channels).sum::<usize>(), width);
        let to = self.vector(width);
        self.ops.push(Op::Sum { source, parts: parts.to_vec(), to });
        to
    }

    /// A weight `[pixels, channels]` as a map that is the same for every sample.
    #[cfg_attr(not(test), expect(dead_code, reason = "networks over latents begin with it"))]
    pub(crate) fn learned(&mut self, name: &Name, size: Size) -> Map {
        let weights = vec![self.weight(name, &[size.height * size.width, size.channels])];
        let to = self.map(size, Kind::Features);
        self.ops.push(Op::Learned { weights, to });
        to
    }

    /// `a·gelu(b)` of the first and second half of the channels.
    pub(crate) fn geglu(&mut self, source: Map) -> Map {
        let to = self.like(source, self.size(source).channels / 2);
        self.ops.push(Op::Geglu { source, to });
        to
    }

    /// `residual + gate·source`, with part `gate` of a vector.
    pub(crate) fn gate(&mut self, source: Map, residual: Map, vector: Map, gate: usize) -> Map {
        let to = self.like(source, self.size(source).channels);
        self.ops.push(Op::Gate { source, residual, vector, gate, to });
        to
    }

    /// An element-wise function.
    pub(crate) fn activate(&mut self, source: Map, function: Function) -> Map {
        let to = self.like(source, self.size(source).channels);
        self.ops.push(Op::Activate { source, function, to });
        to
    }
}

/// The scale of scores, which goes into the queries.
pub(crate) fn query_scale(width: usize, heads: usize) -> f64 {
    1.0 / ((width / heads) as f64).sqrt()
}
