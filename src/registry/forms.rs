//! A model in other forms, at another size, for longer prompts or with LoRAs: each is made when it is first asked for.

use std::{
    hash::Hash,
    num::NonZeroUsize,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use lru::LruCache;
use understudy_models::Error;

/// Forms of a model, beside its own, that are kept compiled: their plans take memory, their weights are shared.
const KEPT: NonZeroUsize = NonZeroUsize::new(4).unwrap();
/// Models with LoRAs that are kept beside one without: each has weights of its own.
const KEPT_CHANGED: NonZeroUsize = NonZeroUsize::new(2).unwrap();

/// What a model's networks are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Form {
    /// Height and width of images, in pixels.
    pub size: [usize; 2],
    /// Parts of a prompt, each of as many tokens as the text encoder takes; 1 for a model without text.
    pub parts: usize,
}

/// LoRAs by name, with the bits of their scales.
pub(super) type Changes = Vec<(String, u64)>;

/// The forms of a model that there are, or will be in a moment; the least recently used are forgotten.
pub(super) struct Forms<T, K: Hash + Eq = Form> {
    kept: Mutex<LruCache<K, Making<T>>>,
    /// Held by whoever makes one: what that takes beside the weights, it takes once.
    turn: Arc<tokio::sync::Mutex<()>>,
}

/// A form on its way, for which all wait who ask for it.
type Making<T> = Shared<BoxFuture<'static, Result<Arc<T>, Arc<Error>>>>;

impl<T> Default for Forms<T> {
    fn default() -> Self {
        Self { kept: Mutex::new(LruCache::new(KEPT)), turn: Arc::default() }
    }
}

impl<T> Default for Forms<T, Changes> {
    fn default() -> Self {
        Self { kept: Mutex::new(LruCache::new(KEPT_CHANGED)), turn: Arc::default() }
    }
}

impl<T: Send + Sync + 'static, K: Hash + Eq + Clone> Forms<T, K> {
    /// The form, which `make` makes on the blocking pool if it is not kept. Whoever asks may go away: what was begun is
    /// finished for those who ask next.
    ///
    /// # Errors
    /// Those of `make`; another call tries again.
    pub(super) async fn get(
        &self,
        form: K,
        make: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<Arc<T>, Arc<Error>> {
        let turn = Arc::clone(&self.turn);
        let making = self.lock().get_or_insert(form.clone(), || begin(turn, make)).clone();
        let made = making.clone().await;
        if made.is_err() {
            let mut kept = self.lock();
            if kept.peek(&form).is_some_and(|it| it.ptr_eq(&making)) {
                kept.pop(&form);
            }
        }
        made
    }

    fn lock(&self) -> MutexGuard<'_, LruCache<K, Making<T>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn begin<T: Send + Sync + 'static>(
    turn: Arc<tokio::sync::Mutex<()>>,
    make: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Making<T> {
    let making = tokio::spawn(async move {
        let _turn = turn.lock().await;
        match tokio::task::spawn_blocking(make).await {
            Ok(made) => made.map(Arc::new).map_err(Arc::new),
            Err(error) => Err(Arc::new(ended(&error))),
        }
    });
    let made = making.map(|made| made.unwrap_or_else(|error| Err(Arc::new(ended(&error)))));
    made.boxed().shared()
}

/// A panic, or the end of the server.
pub(super) fn ended(error: &tokio::task::JoinError) -> Error {
    candle_core::Error::Msg(format!("compiling ended early: {error}")).into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc::channel,
    };

    use super::*;

    fn form(side: usize) -> Form {
        Form { size: [side; 2], parts: 1 }
    }

    #[tokio::test]
    async fn all_who_ask_meanwhile_wait_for_one_and_those_who_leave_stop_nothing() {
        let (forms, count) = (Arc::new(Forms::<usize>::default()), Arc::new(AtomicUsize::new(0)));
        let (go_on, wait) = channel::<()>();
        let begun = {
            let (forms, count) = (Arc::clone(&forms), Arc::clone(&count));
            tokio::spawn(async move {
                let make = move || {
                    let _ = wait.recv();
                    Ok(count.fetch_add(1, Ordering::SeqCst))
                };
                forms.get(form(8), make).await.unwrap()
            })
        };
        while forms.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        begun.abort();
        let never = || panic!("a second one");
        let others = [(); 3].map(|()| forms.get(form(8), never));
        let (others, _) = tokio::join!(futures_util::future::join_all(others), async {
            go_on.send(()).unwrap();
        });
        assert!(others.into_iter().all(|made| *made.unwrap() == 0));
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn the_least_recently_used_and_what_failed_are_made_anew() {
        let forms = Forms::<usize>::default();
        let get = async |side: usize, value: usize| {
            forms.get(form(side), move || Ok(value)).await.map(|made| *made)
        };
        for side in 0..KEPT.get() {
            assert_eq!(get(side, side).await.unwrap(), side);
        }
        assert_eq!(get(0, 100).await.unwrap(), 0);
        assert_eq!(get(99, 99).await.unwrap(), 99);
        assert_eq!((get(0, 100).await.unwrap(), get(1, 100).await.unwrap()), (0, 100));

        let refuse = || Err(Error::value("size", "large", "no memory holds it"));
        let problem = forms.get(form(7), refuse).await.unwrap_err();
        assert!(problem.to_string().contains("no memory"), "{problem}");
        assert_eq!(get(7, 7).await.unwrap(), 7);
        let panics = || -> Result<usize, Error> { panic!("on purpose") };
        let problem = forms.get(form(6), panics).await.unwrap_err();
        assert!(problem.to_string().contains("ended early"), "{problem}");
        assert_eq!(get(6, 6).await.unwrap(), 6);
    }
}
