//! Memory: aligned floats, and a plan of which part of one arena each intermediate result uses.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use memmap2::MmapMut;

use crate::{DeviceFault, memory};

/// Floats in a cache line; channels are padded to a multiple of this, with zeros.
pub(crate) const LINE: usize = 16;

/// `n` rounded up to whole cache lines.
pub(crate) fn padded(n: usize) -> usize {
    n.next_multiple_of(LINE)
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct CacheLine([f32; LINE]);

/// Floats that begin on a cache line, all 0 at first.
pub(crate) struct Aligned {
    storage: Storage,
    len: usize,
}

enum Storage {
    Lines(Vec<CacheLine>),
    /// Of the system itself, which is asked for huge pages: processors fetch ahead within a page only, and weights that come
    /// from memory begin one of 4 KiB every few hundred products.
    Pages(MmapMut),
}

/// Bytes from which the system is asked for pages: a huge page of most processors.
const PAGES: usize = 2 << 20;

/// Zeros in pages of the system, huge ones where it has them.
fn pages(bytes: usize) -> io::Result<MmapMut> {
    let pages = MmapMut::map_anon(bytes)?;
    // A system without them refuses, and nothing else changes.
    #[cfg(target_os = "linux")]
    let _ = pages.advise(memmap2::Advice::HugePage);
    Ok(pages)
}

impl Aligned {
    /// `len` zeros, while a network is built. Where memory ends this unwinds with [`NoMemory`], which
    /// [`NoMemory::caught`] makes an error of.
    pub(crate) fn zeros(len: usize) -> Self {
        // Not by `panic_any`: nothing is wrong with the program.
        Self::try_zeros(len).unwrap_or_else(|error| resume_unwind(Box::new(error)))
    }

    /// `len` zeros.
    ///
    /// # Errors
    /// [`NoMemory`], where an allocation would end the process.
    pub(crate) fn try_zeros(len: usize) -> Result<Self, NoMemory> {
        let lines = len.div_ceil(LINE);
        let error = NoMemory { bytes: 4 * len };
        if error.bytes >= ADMITTED
            && memory::available().is_some_and(|there| error.bytes as u64 > there)
        {
            return Err(error);
        }
        if error.bytes >= PAGES {
            let storage = Storage::Pages(pages(lines * size_of::<CacheLine>()).map_err(|_| error)?);
            return Ok(Self { storage, len });
        }
        let mut zeros = Vec::new();
        zeros.try_reserve_exact(lines).map_err(|_| error)?;
        zeros.resize(lines, CacheLine([0.0; LINE]));
        Ok(Self { storage: Storage::Lines(zeros), len })
    }

    /// The floats of a slice, padded by zeros to a multiple of `whole`.
    pub(crate) fn of(values: &[f32], whole: usize) -> Self {
        let mut all = Self::zeros(values.len().next_multiple_of(whole));
        all.as_mut_slice()[..values.len()].copy_from_slice(values);
        all
    }

    /// The floats.
    pub(crate) fn as_slice(&self) -> &[f32] {
        let start = match &self.storage {
            Storage::Lines(lines) => lines.as_ptr().cast(),
            Storage::Pages(pages) => pages.as_ptr().cast(),
        };
        // SAFETY: there are at least `len` floats, in lines without gaps or in pages, which begin on a line.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }

    /// The floats.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        let start = match &mut self.storage {
            Storage::Lines(lines) => lines.as_mut_ptr().cast(),
            Storage::Pages(pages) => pages.as_mut_ptr().cast(),
        };
        // SAFETY: there are at least `len` floats, in lines without gaps or in pages, which begin on a line.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }
}

/// Bytes for which nobody looks at what is free.
const ADMITTED: usize = 16 << 20;

/// So much memory there is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NoMemory {
    pub(crate) bytes: usize,
}

impl NoMemory {
    /// What `build` makes, or the memory that it found missing.
    pub(crate) fn caught<T>(build: impl FnOnce() -> T) -> Result<T, Self> {
        catch_unwind(AssertUnwindSafe(build)).map_err(|panic| match panic.downcast::<Self>() {
            Ok(error) => *error,
            Err(panic) => resume_unwind(panic),
        })
    }
}

impl From<NoMemory> for candle_core::Error {
    /// Whoever asked may try fewer rows.
    fn from(error: NoMemory) -> Self {
        DeviceFault::OutOfMemory(format!(
            "no {} bytes are free for this batch; take fewer rows, or smaller images",
            error.bytes
        ))
        .into()
    }
}

/// A part of the arena: `len` floats for each sample, the samples one after another.
///
/// Offsets are per sample as well, so a plan holds for any batch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Buffer {
    /// Where it begins, in floats per sample.
    pub(crate) offset: usize,
    /// Floats of one sample, whole cache lines.
    pub(crate) len: usize,
}

impl Buffer {
    /// Whether both use some of the same memory.
    pub(crate) fn overlaps(self, other: Self) -> bool {
        self.offset < other.offset + other.len && other.offset < self.offset + self.len
    }
}

/// Gives out parts of the arena while a plan is made, in the order in which its steps will run:
/// what is given back may be used by the next step.
#[derive(Default)]
pub(crate) struct Layout {
    /// Unused gaps below `end`, ordered, never adjacent.
    gaps: Vec<Buffer>,
    end: usize,
    /// Words per sample in use now, and when there were most.
    live: usize,
    peak: usize,
}

impl Layout {
    /// A part that nothing else uses now, for `len` floats per sample.
    pub(crate) fn take(&mut self, len: usize) -> Buffer {
        let len = padded(len.max(1));
        self.live += len;
        self.peak = self.peak.max(self.live);
        // The smallest gap that is large enough.
        let fitting = self.gaps.iter().enumerate().filter(|(_, gap)| gap.len >= len);
        if let Some((i, _)) = fitting.min_by_key(|(_, gap)| gap.len) {
            let gap = &mut self.gaps[i];
            let taken = Buffer { offset: gap.offset, len };
            *gap = Buffer { offset: gap.offset + len, len: gap.len - len };
            if gap.len == 0 {
                self.gaps.remove(i);
            }
            return taken;
        }
        // Or the gap at the end, made larger.
        let offset = match self.gaps.last() {
            Some(gap) if gap.offset + gap.len == self.end => gap.offset,
            _ => self.end,
        };
        if offset < self.end {
            self.gaps.pop();
        }
        self.end = offset + len;
        Buffer { offset, len }
    }

    /// Gives a part back.
    pub(crate) fn give(&mut self, buffer: Buffer) {
        self.live -= buffer.len;
        let at = self.gaps.partition_point(|gap| gap.offset < buffer.offset);
        self.gaps.insert(at, buffer);
        let joined = |a: Buffer, b: Buffer| {
            (a.offset + a.len == b.offset)
                .then_some(Buffer { offset: a.offset, len: a.len + b.len })
        };
        if at + 1 < self.gaps.len()
            && let Some(gap) = joined(self.gaps[at], self.gaps[at + 1])
        {
            self.gaps[at] = gap;
            self.gaps.remove(at + 1);
        }
        if at > 0
            && let Some(gap) = joined(self.gaps[at - 1], self.gaps[at])
        {
            self.gaps[at - 1] = gap;
            self.gaps.remove(at);
        }
    }

    /// Floats per sample that the whole plan needs.
    pub(crate) fn len(&self) -> usize {
        self.end
    }

    /// Floats per sample in use at once at most: what the plan would need without gaps.
    pub(crate) fn peak(&self) -> usize {
        self.peak
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_in_use_never_overlaps(steps in prop::collection::vec((0usize..200, 0usize..8), 1..100)) {
            let mut layout = Layout::default();
            let mut used: Vec<Buffer> = Vec::new();
            for (len, give) in steps {
                let new = layout.take(len);
                prop_assert!(new.len >= len && new.offset + new.len <= layout.len());
                prop_assert!(layout.peak() <= layout.len());
                prop_assert!(used.iter().all(|old| !old.overlaps(new)));
                used.push(new);
                if give < used.len() {
                    layout.give(used.remove(give));
                }
            }
        }
    }
}
