//! Ranks without MPI, for tests in the crate and beside it.

use std::cell::Cell;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::World;

/// Ranks that are threads, with a channel from each to each.
pub(crate) struct Threads {
    rank: usize,
    to: Vec<Sender<Vec<u8>>>,
    from: Vec<Receiver<Vec<u8>>>,
    sent: Cell<u64>,
}

impl Threads {
    pub(crate) fn world(size: usize) -> Vec<Self> {
        let mut to: Vec<Vec<_>> = (0..size).map(|_| Vec::new()).collect();
        let mut from: Vec<Vec<_>> = (0..size).map(|_| Vec::new()).collect();
        for to in &mut to {
            for from in &mut from {
                let (sender, receiver) = channel();
                to.push(sender);
                from.push(receiver);
            }
        }
        let ranks = to.into_iter().zip(from).enumerate();
        ranks.map(|(rank, (to, from))| Self { rank, to, from, sent: Cell::new(0) }).collect()
    }

    fn tell(&self, rank: usize, bytes: &[u8]) {
        if rank != self.rank {
            self.sent.set(self.sent.get() + bytes.len() as u64);
        }
        self.to[rank].send(bytes.to_vec()).unwrap();
    }
}

impl World for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.to.len()
    }

    fn all_to_all(&self, own: &[u8], all: &mut [u8]) {
        let slice = own.len() / self.size();
        assert_eq!(own.len(), all.len());
        own.chunks(slice).enumerate().for_each(|(rank, slice)| self.tell(rank, slice));
        for (slice, from) in all.chunks_mut(slice).zip(&self.from) {
            slice.copy_from_slice(&from.recv().unwrap());
        }
    }

    fn all_gather(&self, own: &[u8], all: &mut [u8]) {
        (0..self.size()).for_each(|rank| self.tell(rank, own));
        for (slice, from) in all.chunks_mut(own.len()).zip(&self.from) {
            slice.copy_from_slice(&from.recv().unwrap());
        }
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        match self.rank {
            0 => (1..self.size()).for_each(|rank| self.tell(rank, bytes)),
            _ => *bytes = self.from[0].recv().unwrap(),
        }
    }

    fn send(&self, bytes: &[u8]) {
        self.tell(0, bytes);
    }

    fn receive(&self, from: usize) -> Vec<u8> {
        self.from[from].recv().unwrap()
    }

    fn sent_bytes(&self) -> u64 {
        self.sent.get()
    }

    fn close(&self) {}
}
