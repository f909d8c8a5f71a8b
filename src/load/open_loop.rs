//! The open loop: requests go out when they are due, not when earlier ones have come back.

use std::{future::Future, time::Duration};

use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until},
};

use super::Arrival;

/// What a request came to.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// Images.
    Images {
        /// The model that made them.
        model: String,
        /// How many.
        count: u64,
    },
    /// The server said no.
    Refused {
        /// HTTP's status.
        status: u16,
        /// The server's sentence.
        message: String,
    },
    /// There was no answer, or none that could be read.
    Failed(String),
}

/// A request and its answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The request.
    pub arrival: Arrival,
    /// Seconds from when it was due until it was sent.
    pub late_seconds: f64,
    /// Seconds from when it was due until all of its answer was here.
    pub latency_seconds: f64,
    /// Its answer.
    pub answer: Answer,
}

/// Sends every arrival when it is due and hands its outcome to `answered`. At most `connections` are under
/// way at a time; one that is due meanwhile goes out as soon as another is back, and its latency counts
/// from when it was due. Returns when all are answered; or when `stop` resolves, and then drops what is
/// under way. The answer is how many seconds it took and how many requests went out.
pub async fn open_loop<F>(
    arrivals: impl Iterator<Item = Arrival>,
    connections: usize,
    send: impl Fn(Arrival) -> F,
    mut answered: impl FnMut(Outcome),
    stop: impl Future<Output = ()>,
) -> (f64, u64)
where
    F: Future<Output = Answer> + Send + 'static,
{
    let began = Instant::now();
    let mut arrivals = arrivals.peekable();
    let mut under_way = JoinSet::new();
    let mut sent = 0;
    tokio::pin!(stop);
    loop {
        let next = arrivals.peek().copied().filter(|_| under_way.len() < connections);
        if next.is_none() && under_way.is_empty() {
            break;
        }
        let due = next.map(|arrival| began + Duration::from_secs_f64(arrival.at));
        tokio::select! {
            biased;
            () = &mut stop => break,
            () = sleep_until(due.unwrap_or(began)), if due.is_some() => {
                let (Some(arrival), Some(due)) = (arrivals.next(), due) else { continue };
                let late_seconds = due.elapsed().as_secs_f64();
                let answer = send(arrival);
                sent += 1;
                under_way.spawn(async move {
                    let answer = answer.await;
                    let latency_seconds = due.elapsed().as_secs_f64();
                    Outcome { arrival, late_seconds, latency_seconds, answer }
                });
            }
            Some(outcome) = under_way.join_next() => match outcome {
                Ok(outcome) => answered(outcome),
                // A defect of `send`, not of the server.
                Err(panic) => std::panic::resume_unwind(panic.into_panic()),
            },
        }
    }
    (began.elapsed().as_secs_f64(), sent)
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        future::{pending, ready},
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
    };

    use tokio::time::sleep;

    use super::*;
    use crate::{
        load::arrivals,
        percentiles::{percentile, sorted},
    };

    fn images() -> Answer {
        Answer::Images { model: "m".into(), count: 1 }
    }

    fn every(seconds: f64, count: u64) -> Vec<Arrival> {
        (0..count).map(|number| Arrival { number, at: number as f64 * seconds, entry: 0 }).collect()
    }

    /// Answers in 10 ms, but not at all between the seconds 4 and 6 of its time.
    async fn stalling(zero: Instant) -> Answer {
        let now = zero.elapsed().as_secs_f64();
        let stalled = if (4.0..6.0).contains(&now) { 6.0 - now } else { 0.0 };
        sleep(Duration::from_secs_f64(stalled + 0.01)).await;
        images()
    }

    /// A tenth of the time the server stalls: whoever comes then waits up to two seconds, a second on
    /// average. A loop that waits for its answers would have sent one request then.
    #[tokio::test(start_paused = true)]
    async fn a_stall_is_charged_for_all_who_come_meanwhile() {
        let plan: Vec<_> = arrivals(1, 50.0, 20.0, &"m".parse().unwrap()).collect();
        for connections in [256, 1] {
            let (zero, mut latencies, mut of_sends) = (Instant::now(), Vec::new(), Vec::new());
            let (seconds, sent) = open_loop(
                plan.iter().copied(),
                connections,
                |_| stalling(zero),
                |outcome| {
                    latencies.push(outcome.latency_seconds);
                    of_sends.push(outcome.latency_seconds - outcome.late_seconds);
                },
                pending(),
            )
            .await;
            assert_eq!(sent, plan.len() as u64);
            assert!((19.5..21.0).contains(&seconds), "{seconds}");
            let stalled = latencies.iter().filter(|&&seconds| seconds > 0.1).count();
            let came = plan.iter().filter(|a| (4.0..5.9).contains(&a.at)).count();
            assert!(stalled >= came, "{stalled} of {came}");
            let latencies = sorted(latencies);
            assert!((1.7..2.1).contains(&percentile(&latencies, 99)), "{latencies:?}");
            if connections == 1 {
                // What a tool sees that counts from when it got round to sending: nothing.
                let of_sends = sorted(of_sends);
                assert!(percentile(&of_sends, 99) < 0.02, "{of_sends:?}");
            } else {
                assert!(percentile(&latencies, 50) < 0.02);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn as_many_are_under_way_as_there_are_connections() {
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let send = |_| {
            let (now, most) = (Arc::clone(&now), Arc::clone(&most));
            async move {
                most.fetch_max(now.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
                sleep(Duration::from_secs(1)).await;
                now.fetch_sub(1, Ordering::Relaxed);
                images()
            }
        };
        let mut late = VecDeque::new();
        let arrivals = every(0.1, 40).into_iter();
        open_loop(arrivals, 4, send, |o| late.push_back(o.late_seconds), pending()).await;
        assert_eq!(most.load(Ordering::Relaxed), 4);
        // Four a second go out where ten are due: the last is due at 3.9 s and goes out at about 9 s.
        assert!(late.front().is_some_and(|&first| first < 0.01));
        assert!(late.back().is_some_and(|last| (5.0..5.6).contains(last)), "{late:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn stopping_drops_what_is_under_way() {
        let mut answers = 0;
        let send = |arrival: Arrival| async move {
            if arrival.number >= 3 {
                pending::<()>().await;
            }
            images()
        };
        let stop = sleep(Duration::from_secs_f64(0.95));
        let (seconds, sent) =
            open_loop(every(0.1, 100).into_iter(), 256, send, |_| answers += 1, stop).await;
        assert_eq!((answers, sent), (3, 10));
        assert!((0.95..1.0).contains(&seconds), "{seconds}");
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_to_send_is_over_at_once() {
        let send = |_| ready(images());
        let over = open_loop(std::iter::empty(), 1, send, |_| unreachable!(), pending()).await;
        assert_eq!(over.1, 0);
    }
}
