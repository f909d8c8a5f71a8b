//! What U-Nets and autoencoders are built of: residual blocks and attention between the pixels of a map.

use crate::graph::{Epilogue, GraphBuilder, Map, Name};
use crate::kernels::{Function, Taps};

/// How the blocks of a network normalise, and how the time acts on them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Style {
    /// Groups of a norm, and what it adds to a variance.
    pub(crate) norm: (usize, f64),
    /// What follows a norm.
    pub(crate) function: Function,
    /// Nothing in a network without time.
    pub(crate) time: Option<Time>,
}

/// How a residual block uses the vector that tells the time.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Time {
    /// A projection of it is added between the convolutions.
    Added(Map),
    /// A projection of it scales and shifts the second norm.
    Modulates(Map),
}

/// Whether a residual block changes the map's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resize {
    /// It does not.
    Keep,
    /// Twice the size, by repetition.
    Up,
    /// Half the size, by averaging.
    Down,
}

/// Norm, activation, convolution, twice, with the time in between and a way around, over the channels of all `sources`:
/// `ResnetBlock2D` of diffusers, `ResBlock` of Dhariwal & Nichol (2021). The sum is divided by `scale`.
pub(crate) fn resnet(
    g: &mut GraphBuilder,
    name: &Name,
    sources: &[Map],
    channels: usize,
    style: Style,
    resize: Resize,
    scale: f64,
) -> Map {
    let Style { norm, function, time } = style;
    let input: usize = sources.iter().map(|&source| g.size(source).channels).sum();

    let normed = g.group_norm(&name.at("norm1"), sources, norm, None, function);
    let h = if resize == Resize::Down { g.downsample(normed) } else { normed };
    let place = name.at("time_emb_proj");
    let (offset, modulation) = match time {
        None => (None, None),
        Some(Time::Added(vector)) => (Some(g.project(&place, vector, channels)), None),
        Some(Time::Modulates(vector)) => (None, Some(g.project(&place, vector, 2 * channels))),
    };
    let taps = Taps { doubled: resize == Resize::Up, ..Taps::SAME };
    let epilogue = Epilogue { offset, ..Epilogue::default() };
    let h = g.convolve(&name.at("conv1"), h, channels, taps, epilogue);
    let normed = g.group_norm(&name.at("norm2"), &[h], norm, modulation, function);

    let around = match resize {
        Resize::Keep => sources.to_vec(),
        Resize::Up => vec![g.upsample(sources[0])],
        Resize::Down => vec![g.downsample(sources[0])],
    };
    // Two maps always join to more channels than there are afterwards.
    let residual = if input == channels {
        around[0]
    } else {
        let (place, kernel) = (name.at("conv_shortcut"), [channels, input, 1, 1]);
        g.kernel(&place, &around, &kernel, Epilogue::default())
    };
    let factor = (1.0 / scale) as f32;
    let epilogue = Epilogue { residual: Some(residual), factor, ..Epilogue::default() };
    g.convolve(&name.at("conv2"), normed, channels, Taps::SAME, epilogue)
}

/// Self-attention over the pixels of `x`, normalised or not, and a way around; the sum is divided by `scale`.
pub(crate) fn attention(
    g: &mut GraphBuilder,
    name: &Name,
    x: Map,
    heads: usize,
    norm: Option<(usize, f64)>,
    scale: f64,
) -> Map {
    let channels = g.size(x).channels;
    let normed = match norm {
        None => x,
        Some(norm) => g.group_norm(&name.at("group_norm"), &[x], norm, None, Function::Identity),
    };
    let gathered = g.self_attention(name, normed, heads, true);
    let factor = (1.0 / scale) as f32;
    let epilogue = Epilogue { residual: Some(x), factor, ..Epilogue::default() };
    g.linear_with(&name.at("to_out.0"), gathered, channels, epilogue)
}
