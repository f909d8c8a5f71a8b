//! The processes that share a run, and how they reach one another.

/// The processes that share a run, as one of them sees them: the *ranks*, numbered from 0. All of them call the same methods in
/// the same order, with slices of the same length. There is no method that fails: a process that loses another one ends,
/// or is ended by what started it.
pub trait World {
    /// The number of this process.
    fn rank(&self) -> usize;

    /// How many there are.
    fn size(&self) -> usize;

    /// Slice `i` of `own` goes to rank `i`, and slice `i` of `all` comes from there; both are `size` slices of equal length.
    fn all_to_all(&self, own: &[u8], all: &mut [u8]);

    /// Every rank's `own`, one after the other in `all`, for every rank.
    fn all_gather(&self, own: &[u8], all: &mut [u8]);

    /// Of the first rank to all others, whatever length theirs have.
    fn broadcast(&self, bytes: &mut Vec<u8>);

    /// To the first rank.
    fn send(&self, bytes: &[u8]);

    /// What the rank `from` sends to the first one, which this is.
    fn receive(&self, from: usize) -> Vec<u8>;

    /// Bytes that this rank has handed over for others so far.
    fn sent_bytes(&self) -> u64;

    /// Nothing more is said. Every rank comes here before any goes on.
    fn close(&self);
}

/// One process that has the run to itself.
#[derive(Debug, Clone, Copy)]
pub struct Alone;

impl World for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_to_all(&self, own: &[u8], all: &mut [u8]) {
        all.copy_from_slice(own);
    }

    fn all_gather(&self, own: &[u8], all: &mut [u8]) {
        all.copy_from_slice(own);
    }

    fn broadcast(&self, _: &mut Vec<u8>) {}

    fn send(&self, _: &[u8]) {}

    fn receive(&self, _: usize) -> Vec<u8> {
        Vec::new()
    }

    fn sent_bytes(&self) -> u64 {
        0
    }

    fn close(&self) {}
}
